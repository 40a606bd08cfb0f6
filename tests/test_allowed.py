"""What a setting may be."""

from __future__ import annotations

import pickle

import pytest

from fedsplit.allowed import (
    SettingError,
    above,
    at_least,
    below,
    one_of,
    parse_cut,
    parse_memory,
    parse_partition,
    parse_quantization,
)


@pytest.mark.parametrize(
    ("allowed", "inside", "outside"),
    [
        (at_least(1), [1, 2.5], [0.99, float("nan"), float("inf")]),
        (at_least(0, 3), [0, 3], [-1, 3.1]),
        (above(0), [1e-9], [0, float("inf")]),
        (below(0, 1), [0, 0.99], [1, -0.1, float("nan")]),
        (one_of(["a", "b"]), ["a"], ["c", ""]),
    ],
)
def test_bounds_belong_to_it_or_not_as_its_words_say(allowed, inside, outside) -> None:
    assert all(allowed.test(value) for value in inside)
    assert not any(allowed.test(value) for value in outside)


@pytest.mark.parametrize(
    ("text", "size"), [("800MB", 800 * 10**6), ("1.5GB", 1.5e9), ("2GiB", 2 * 2**30), ("3 kB", 3000), ("3", None)]
)
def test_memory_is_read_with_its_unit(text: str, size: float | None) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize(("text", "cut"), [("1:5", (1, 5)), ("5:1", None), ("1:1", None), ("1", None), ("a:b", None)])
def test_a_cut_is_two_numbers_that_rise(text: str, cut: tuple[int, int] | None) -> None:
    assert parse_cut(text) == cut


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("trunk:4,top:8", {"trunk": 4, "top": 8}),
        ("", {}),
        ("trunk:5", None),
        ("trunk:4,trunk:8", None),
        ("all:4", None),
    ],
)
def test_bits_are_told_by_part(text: str, bits: dict[str, int] | None) -> None:
    assert parse_quantization(text) == bits


def test_a_partition_that_cannot_be_is_refused_with_those_that_can() -> None:
    assert parse_partition("dirichlet:0.3:topic").column == "topic"
    with pytest.raises(SettingError, match=r"^partition: dirichlet:-1 is not possible; allowed: auto"):
        parse_partition("dirichlet:-1")


def test_an_error_survives_the_way_to_another_process() -> None:
    error = pickle.loads(pickle.dumps(SettingError("cut", "9:9", "LO:HI")))
    assert (str(error), error.setting) == ("cut: 9:9 is not possible; allowed: LO:HI", "cut")
