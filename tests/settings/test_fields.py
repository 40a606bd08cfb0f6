"""Values of settings, of Python's own types and of others."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from fedsplit.settings.fields import plain, setting, suits, words_of
from fedsplit.settings.validators import TEXT, at_least


@dataclasses.dataclass
class Example:
    """A count and a name."""

    count: int = setting(1, at_least(1, 9), "number of things")
    name: str = setting("a", TEXT, "name of the thing")


COUNT, NAME = dataclasses.fields(Example)


@pytest.mark.parametrize(
    ("kind", "given", "value"),
    [
        (int, np.int64(3), 3),
        (float, np.float32(0.5), 0.5),
        (str, Path("a/b"), "a/b"),
        (tuple[int, ...], [np.int64(2), 4], (2, 4)),
        (int, "3", "3"),
        (int, True, True),
    ],
)
def test_a_value_that_stands_for_pythons_own_becomes_it(kind: object, given: object, value: object) -> None:
    assert plain(kind, given) == value
    assert type(plain(kind, given)) is type(value)


@pytest.mark.parametrize("value", [0, 10, True, 1.0, "1", None])
def test_another_value_or_another_type_does_not_suit(value: object) -> None:
    assert suits(COUNT, int, 9)
    assert not suits(COUNT, int, value)


def test_half_a_character_suits_no_text() -> None:
    assert suits(NAME, str, "b")
    assert not suits(NAME, str, "\udc80")


def test_the_words_of_a_whole_number_say_so() -> None:
    assert words_of(COUNT, int) == "a whole number from 1 to 9"
