"""Files of CSV, JSON and text to columns. Nothing is guessed: what looks like a date or like no value stays text."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

Columns = Mapping[str, Sequence[Any]]
"""Values by the columns' names, all of the same length."""

READ_HERE = (".csv", ".json", ".jsonl")
"""Endings of files of rows that this module reads."""

_ENCODING = "utf-8-sig"
"""UTF-8, of which a byte order mark at the beginning is no part of the text."""

_WHOLE = re.compile(r"-?(0|[1-9][0-9]*)")


def read_text(path: Path) -> str:
    """Reads a text file as one text, without the white space around it.

    Raises:
        ValueError: It cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding=_ENCODING).strip()
    except OSError as error:
        raise ValueError(str(error)) from None


def read_rows(paths: Sequence[Path], numbers: Collection[str] = ()) -> Columns:
    """Reads files of rows, one after the other.

    Args:
        paths: Files that end in one of `READ_HERE`.
        numbers: Columns of CSV files whose values are whole numbers where all of them look like whole numbers.

    Returns:
        All columns of all files; None where a row has no such value. Of columns of one name, see `doubled_columns`, it
        has only one.

    Raises:
        ValueError: A file cannot be read; in one line, with the number of the file's line.
    """
    rows: list[dict[str, Any]] = []
    for path in paths:
        try:
            rows += _csv_rows(path) if path.suffix == ".csv" else _json_rows(path)
        except (OSError, ValueError, RecursionError) as error:
            where = f"{path.name}: " if len(paths) > 1 else ""
            raise ValueError(f"{where}{error}") from None
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    if paths[0].suffix == ".csv":
        columns |= {name: _numbers(columns[name]) for name in numbers if name in columns}
    return columns


def doubled_columns(paths: Sequence[Path]) -> frozenset[str]:
    """Names that two columns of one CSV file share."""
    found: set[str] = set()
    for path in paths:
        if path.suffix != ".csv":
            continue
        with path.open(encoding=_ENCODING, newline="") as file:
            names = next((values for values in csv.reader(file, strict=True) if values), [])
        found |= {name for name in names if name and names.count(name) > 1}
    return frozenset(found)


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a CSV file, all values as they are written; a value that is empty or not there is None."""
    csv.field_size_limit(sys.maxsize)  # a text may be longer than the library's 128 KiB
    found: list[dict[str, Any]] = []
    with path.open(encoding=_ENCODING, newline="") as file:
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
                found.append({name: value or None for name, value in zip(names, values, strict=False)})
        except UnicodeDecodeError:
            raise
        except (csv.Error, ValueError) as error:
            raise ValueError(f"line {reader.line_num} is not CSV: {error}") from None
    return found


def _header(values: Sequence[str]) -> list[str]:
    """Names of the columns; the place stands for a name that is empty, as that of an index that pandas wrote."""
    return [value or f"column {place}" for place, value in enumerate(values, 1)]


def _numbers(values: Sequence[Any]) -> list[Any]:
    """The values of a column of CSV as whole numbers, if all that are there look like whole numbers."""
    there = [value for value in values if value is not None]
    if there and all(_WHOLE.fullmatch(value) for value in there):
        return [None if value is None else int(value) for value in values]
    return list(values)


def _json_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON file: an object a line, or one list of objects, or one of texts."""
    with path.open(encoding=_ENCODING) as file:
        first = next((line for line in file if line.strip()), "")
    if first.lstrip().startswith("["):
        return _listed(path)
    found: list[dict[str, Any]] = []
    with path.open(encoding=_ENCODING) as file:  # lines end at line breaks, and not at what Unicode says may end them
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                if not found and (alone := _alone(path)) is not None:
                    return [alone]
                raise ValueError(f"line {number} is not JSON: {_fault(error)}") from None
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no JSON object")
            found.append(row)
    return found


def _fault(error: ValueError) -> str:
    return f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else str(error)


def _listed(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding=_ENCODING))
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    if rows and all(isinstance(row, str) for row in rows):
        return [{"text": row} for row in rows]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"number {number} of its list is no JSON object")
    return list(rows)


def _alone(path: Path) -> dict[str, Any] | None:
    """The only object of a file, written over several lines; None if the file is anything else."""
    try:
        row = json.loads(path.read_text(encoding=_ENCODING))
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
