"""The classes that texts are sorted into: how many there are, and which one a row is of."""

from __future__ import annotations

from collections.abc import Sequence

from fedsplit.allowed import SettingError
from fedsplit.corpora.tables import Table


def classes_of(table: Table, column: str) -> tuple[str, ...]:
    """The names of all classes, by their numbers.

    Numbers in the column are the classes themselves, from 0 to the largest; anything else is a name, and classes are
    numbered in the order of their names.

    Args:
        table: The data set.
        column: The column of the labels.

    Raises:
        SettingError: There is no such column, a label is missing or no class, or there is one class only.
    """
    values = table.column("data.label", column)
    if names := table.classes.get(column):
        return tuple(names)
    numbers = [value for value in values if isinstance(value, int) and not isinstance(value, bool)]
    for row, value in enumerate(values, 1):
        if value is None or isinstance(value, float | list | dict) or (isinstance(value, int) and value < 0):
            raise _strange(table, row, value, "rows whose labels are all names, or all whole numbers from 0 on")
        if numbers and (isinstance(value, bool) or not isinstance(value, int)):
            raise _strange(table, row, value, "rows whose labels are all names, or all whole numbers from 0 on")
    count = max(numbers, default=-1) + 1
    if count > len(values) + 1 and count > 2 * len(set(numbers)):
        row = values.index(max(numbers)) + 1
        raise _strange(table, row, max(numbers), "rows whose labels number few classes, from 0 on")
    found = tuple(map(str, range(count))) if numbers else tuple(sorted(map(str, set(values))))
    if len(found) < 2:
        words = f"a column of labels of two classes or more, unlike {column} of {table.dataset}"
        raise SettingError("data.label", column, words)
    return found


def numbers_of(table: Table, column: str, classes: Sequence[str]) -> list[int]:
    """The number of every row's class.

    Args:
        table: The data set that the classes were found in, or another one.
        column: The column of the labels.
        classes: Their names.

    Raises:
        SettingError: A label is missing, or none of the classes.
    """
    values, known = table.column("data.label", column), {name: number for number, name in enumerate(classes)}
    named = table.classes.get(column)
    found = []
    for row, value in enumerate(values, 1):
        inside = isinstance(value, int) and named is not None and 0 <= value < len(named)
        name = named[value] if inside and named else None if named else str(value)
        if value is None or name not in known:
            words = f"rows whose labels are among {', '.join(classes[:6])}{' …' if len(classes) > 6 else ''}"
            raise _strange(table, row, value, words)
        found.append(known[name])
    return found


def _strange(table: Table, row: int, value: object, words: str) -> SettingError:
    what = "has no label" if value is None else f"has the label {value}"
    return SettingError("dataset", table.dataset, f"{words} (row {row} {what})")
