"""Classes: how many there are, which one a row is of, and rows that have none."""

from __future__ import annotations

from typing import Any

import pytest

from fedsplit.corpora.classes import classes_of, numbers_of
from fedsplit.corpora.data_table import Table
from fedsplit.errors import SettingError


def table(labels: list[Any], names: list[str] | None = None) -> Table:
    return Table("notes.csv", "notes", {"label": labels}, {"label": names} if names else {})


@pytest.mark.parametrize(
    ("labels", "names", "classes", "numbers"),
    [
        ([2, 0, 1, 2], None, ("0", "1", "2"), [2, 0, 1, 2]),
        ([2, 0], None, ("0", "1", "2"), [2, 0]),
        (["good", "bad", "good"], None, ("bad", "good"), [1, 0, 1]),
        ([True, False], None, ("False", "True"), [1, 0]),
        ([1, 1], ["bad", "good", "none"], ("bad", "good", "none"), [1, 1]),
    ],
)
def test_classes_and_their_numbers(
    labels: list[Any], names: list[str] | None, classes: tuple[str, ...], numbers: list[int]
) -> None:
    found = table(labels, names)
    assert classes_of(found, "label") == classes
    assert numbers_of(found, "label", classes) == numbers


def test_other_data_have_the_classes_of_the_first() -> None:
    """By name, whatever their own numbers are."""
    assert numbers_of(table([0, 1], ["good", "bad"]), "label", ("bad", "good")) == [1, 0]
    assert numbers_of(table(["good"]), "label", ("bad", "good")) == [1]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, None], "row 2 has no label"),
        ([0, -1], "row 2 has the label -1"),
        (["a", None], "row 2 has no label"),
        (["a", 1], "row 1 has the label a"),
        ([1, True], "row 2 has the label True"),
        ([0.5, 1.5], "row 1 has the label 0.5"),
        ([0, 1, 4711], "row 3 has the label 4711"),
        (["a", "a"], "data.label: label is not possible; allowed: a column of labels of two classes or more"),
    ],
)
def test_labels_that_are_none_are_named(labels: list[Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        classes_of(table(labels), "label")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (table([0, 3]), "among 0, 1, 2 .row 2 has the label 3"),
        (table([0, -1], ["0", "1", "2"]), "row 2 has the label -1"),
        (table([None]), "row 1 has no label"),
        (table(["x"]), "row 1 has the label x"),
    ],
)
def test_labels_out_of_range_are_named(found: Table, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        numbers_of(found, "label", ("0", "1", "2"))


def test_a_column_that_is_missing_is_named() -> None:
    with pytest.raises(SettingError, match=r"data.label: kind is not possible; allowed: a column of notes.csv: label"):
        classes_of(table([0, 1]), "kind")
