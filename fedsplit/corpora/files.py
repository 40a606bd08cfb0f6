"""Reads CSV, JSON and text files as columns.

No type is guessed: a value that looks like a date, or like NA, stays text.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

Columns = Mapping[str, Sequence[Any]]
"""Values of each column. All columns have equal lengths."""

READ_HERE = (".csv", ".json", ".jsonl")
"""Endings of the files that `read_rows` reads."""

_ENCODING = "utf-8-sig"
"""UTF-8 without the byte order mark that may precede the text."""

# Without leading zeros: 007 is a name.
_WHOLE_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)")


def read_text(path: Path) -> str:
    """Reads a file as one text and strips the white space around it.

    Raises:
        ValueError: The file cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding=_ENCODING).strip()
    except OSError as error:
        raise ValueError(str(error)) from None


def read_rows(paths: Sequence[Path], numbers: Collection[str] = ()) -> Columns:
    r"""Reads the rows of several files, one file after the other.

    Args:
        paths: Files that end in one of `READ_HERE`.
        numbers: Columns of CSV files to read as whole numbers, if all values of the column look like whole numbers.

    Returns:
        All columns of all files, with None for missing values. Of two columns with one name (see `doubled_columns`),
        only the second is returned.

    Raises:
        ValueError: A file cannot be read. The message is one line, with the line of the file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "notes.csv"
        ...     _ = path.write_text("text,label\nhello,1\n,2\n")
        ...     read_rows([path], numbers=["label"])
        {'text': ['hello', None], 'label': [1, 2]}
    """
    rows: list[dict[str, Any]] = []
    for path in paths:
        try:
            rows += _csv_rows(path) if path.suffix == ".csv" else _json_rows(path)
        except (OSError, ValueError, RecursionError) as error:  # deeply nested JSON exhausts the stack
            where = f"{path.name}: " if len(paths) > 1 else ""
            raise ValueError(f"{where}{error}") from None
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    if paths[0].suffix == ".csv":
        for name in numbers:
            if name in columns:
                columns[name] = _numbers(columns[name])
    return columns


def doubled_columns(paths: Sequence[Path]) -> frozenset[str]:
    """Returns the names of two columns of one CSV file. A row as a dictionary can hold one of the two columns only."""
    doubled: set[str] = set()
    for path in paths:
        if path.suffix != ".csv":
            continue
        with path.open(encoding=_ENCODING, newline="") as file:
            names = next((values for values in csv.reader(file, strict=True) if values), [])
        doubled |= {name for name in names if name and names.count(name) > 1}
    return frozenset(doubled)


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    """Reads the rows of a CSV file. All values are texts; an empty or missing value is None."""
    csv.field_size_limit(sys.maxsize)  # a text may be longer than the library's limit of 128 KiB
    rows: list[dict[str, Any]] = []
    with path.open(encoding=_ENCODING, newline="") as file:
        # Otherwise a quotation mark that is never closed would make one text of the rest of the file.
        reader = csv.reader(file, strict=True)
        names: list[str] = []
        try:
            for values in reader:
                if not values:
                    continue
                if not names:
                    names = _header(values)
                    continue
                if len(values) > len(names):
                    raise ValueError(f"it has {len(values)} values, and there are {len(names)} columns")
                pairs = zip(names, values, strict=False)  # a short row lacks the last columns
                rows.append({name: value or None for name, value in pairs})
        except UnicodeDecodeError:  # a ValueError, too, but of no single line
            raise
        except (csv.Error, ValueError) as error:
            raise ValueError(f"line {reader.line_num} is not CSV: {error}") from None
    return rows


def _header(values: Sequence[str]) -> list[str]:
    """Returns the names of the columns. An empty name, such as the name of an index from pandas, becomes `column N`."""
    return [value or f"column {place}" for place, value in enumerate(values, 1)]


def _numbers(values: Sequence[Any]) -> list[Any]:
    """Returns the values of a CSV column as whole numbers if all look like whole numbers, else unchanged.

    Example:
        >>> _numbers(["1", None, "2"]), _numbers(["007"])
        ([1, None, 2], ['007'])
    """
    present = [value for value in values if value is not None]
    if present and all(_WHOLE_NUMBER.fullmatch(value) for value in present):
        return [None if value is None else int(value) for value in values]
    return list(values)


def _json_rows(path: Path) -> list[dict[str, Any]]:
    """Reads the rows of a JSON file: one object a line, a list of objects, or a list of texts."""
    with path.open(encoding=_ENCODING) as file:
        first = next((line for line in file if line.strip()), "")
    if first.lstrip().startswith("["):
        return _rows_of_list(path)

    rows: list[dict[str, Any]] = []
    # Iterating a file ends lines at line breaks alone; str.splitlines would end them at other Unicode separators, too.
    with path.open(encoding=_ENCODING) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                # An object over several lines fails at its first line.
                single = None if rows else _single_object(path)
                if single is not None:
                    return [single]
                raise ValueError(f"line {number} is not JSON: {_fault(error)}") from None
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no JSON object")
            rows.append(row)
    return rows


def _fault(error: ValueError) -> str:
    """Describes an error of a line, without json's line number, which counts within the line."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (column {error.colno})"
    return str(error)


def _rows_of_list(path: Path) -> list[dict[str, Any]]:
    """Reads a JSON file with a single list, of objects or of texts."""
    try:
        rows = json.loads(path.read_text(encoding=_ENCODING))
    except UnicodeDecodeError:  # a ValueError, too, but no fault in the JSON
        raise
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    if rows and all(isinstance(row, str) for row in rows):
        return [{"text": row} for row in rows]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"number {number} of its list is no JSON object")
    return list(rows)


def _single_object(path: Path) -> dict[str, Any] | None:
    """Reads a file with a single object over several lines. Returns None for a different file."""
    try:
        row = json.loads(path.read_text(encoding=_ENCODING))
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
