"""Settings as objects: values of Python's own types and of others, and the words for them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from fedsplit.settings.fields import setting, settings_of
from fedsplit.settings.validators import ANYTHING, NAMES, TEXT, at_least


@dataclasses.dataclass
class Example:
    """One setting of each type, and a field that is none."""

    count: int = setting(1, at_least(1, 9), "number of things", "--things")
    rate: float = setting(0.5, at_least(0), "rate of the things")
    name: str = setting("a", TEXT, "name of the thing")
    sizes: tuple[int, ...] = setting((), ANYTHING, "sizes of the things")
    names: tuple[str, ...] = setting((), NAMES, "names of the things")
    notes: str = ""


BY_FIELD = {setting.field: setting for setting in settings_of(Example, "example")}


def test_a_setting_is_read_from_its_field() -> None:
    assert list(BY_FIELD) == ["count", "rate", "name", "sizes", "names"]
    count, sizes = BY_FIELD["count"], BY_FIELD["sizes"]
    assert (count.name, count.section, count.python_type, count.item_type) == ("example.count", "example", int, None)
    assert (count.default, count.help, count.alias) == (1, "number of things", "--things")
    assert (sizes.python_type, sizes.item_type) == (tuple, int)
    assert [setting.name for setting in settings_of(Example)] == list(BY_FIELD)


@pytest.mark.parametrize(
    ("field", "given", "value"),
    [
        ("count", np.int64(3), 3),
        ("rate", np.float32(0.5), 0.5),
        ("name", Path("a/b"), "a/b"),
        ("sizes", [np.int64(2), 4], (2, 4)),
        ("count", "3", "3"),
        ("count", True, True),
    ],
)
def test_a_value_that_stands_for_pythons_own_becomes_it(field: str, given: object, value: object) -> None:
    converted = BY_FIELD[field].in_python_type(given)
    assert converted == value
    assert type(converted) is type(value)


@pytest.mark.parametrize("value", [0, 10, True, 1.0, "1", None])
def test_another_value_or_another_type_is_not_accepted(value: object) -> None:
    assert BY_FIELD["count"].accepts(9)
    assert not BY_FIELD["count"].accepts(value)


def test_a_whole_number_is_a_rate() -> None:
    assert BY_FIELD["rate"].accepts(1)
    assert not BY_FIELD["rate"].accepts(True)


def test_half_a_character_is_no_text() -> None:
    assert BY_FIELD["name"].accepts("b")
    assert not BY_FIELD["name"].accepts("\udc80")
    assert BY_FIELD["names"].accepts(("b", "c"))
    assert not BY_FIELD["names"].accepts(("b", "\ud800"))
    assert not BY_FIELD["sizes"].accepts((1, True))


def test_the_words_of_a_whole_number_say_so() -> None:
    assert BY_FIELD["count"].words == "a whole number from 1 to 9"
    assert BY_FIELD["rate"].words == "a number of at least 0"
