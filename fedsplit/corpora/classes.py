"""The classes of classified texts: their names, and the class of each row."""

from __future__ import annotations

from collections.abc import Sequence

from fedsplit.corpora.data_table import Table
from fedsplit.errors import SettingError


def classes_of(table: Table, column: str) -> tuple[str, ...]:
    """Returns the names of all classes, in the order of their numbers.

    Whole numbers in the column are class numbers, from 0 to the largest. Values of any further type are class names,
    numbered in alphabetical order.

    Args:
        table: The data set.
        column: Column of the labels.

    Raises:
        SettingError: The column does not exist, a label is missing or invalid, or there is only one class.

    Example:
        >>> classes_of(Table("notes.csv", "notes", {"mood": ["sad", "glad", "sad"]}), "mood")
        ('glad', 'sad')
    """
    values = table.column("data.label", column)
    names = table.classes.get(column)
    if names:
        return tuple(names)

    numbers = [value for value in values if _is_number(value)]
    for row, value in enumerate(values, 1):
        is_negative = isinstance(value, int) and value < 0
        is_invalid = value is None or isinstance(value, float | list | dict)
        is_mixed = bool(numbers) and not _is_number(value)
        if is_invalid or is_negative or is_mixed:
            raise _bad_label(table, row, value, "rows whose labels are all names, or all whole numbers from 0 on")

    count = max(numbers, default=-1) + 1
    # Far more class numbers than labels: the column holds something else, such as ids.
    leaves_gaps = count > len(values) + 1 and count > 2 * len(set(numbers))
    if leaves_gaps:
        row = values.index(max(numbers)) + 1
        raise _bad_label(table, row, max(numbers), "rows whose labels number few classes, from 0 on")

    named = sorted(str(value) for value in set(values))
    classes = tuple(map(str, range(count))) if numbers else tuple(named)
    if len(classes) < 2:
        needed = f"a column of labels of two classes or more, unlike {column} of {table.dataset}"
        raise SettingError("data.label", column, needed)
    return classes


def numbers_of(table: Table, column: str, classes: Sequence[str]) -> list[int]:
    """Returns the class number of every row.

    Args:
        table: The data set that the classes come from, or a further data set with these classes.
        column: Column of the labels.
        classes: Names of the classes.

    Raises:
        SettingError: A label is missing or is no class.

    Example:
        >>> numbers_of(Table("notes.csv", "notes", {"mood": ["sad", "glad", "sad"]}), "mood", ["glad", "sad"])
        [1, 0, 1]
    """
    values = table.column("data.label", column)
    number_of = {name: number for number, name in enumerate(classes)}
    names_in_table = table.classes.get(column)  # the column then holds numbers into these names

    numbers = []
    for row, value in enumerate(values, 1):
        name = _class_name(value, names_in_table)
        if name not in number_of:
            more = " …" if len(classes) > 6 else ""
            raise _bad_label(table, row, value, f"rows whose labels are among {', '.join(classes[:6])}{more}")
        numbers.append(number_of[name])
    return numbers


def _class_name(value: object, names: Sequence[str] | None) -> str | None:
    """Returns the class name of a label; None if the label is missing or has no name."""
    if value is None:
        return None
    if not names:
        return str(value)
    if isinstance(value, int) and 0 <= value < len(names):
        return names[value]
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _bad_label(table: Table, row: int, value: object, needed: str) -> SettingError:
    found = "has no label" if value is None else f"has the label {value}"
    return SettingError("dataset", table.dataset, f"{needed} (row {row} {found})")
