"""Numbers and tables for people."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from fedsplit.formatting import aligned, fitted, perplexity, plain_number, size, virtual_duration


def test_numbers_for_people() -> None:
    assert [size(n) for n in (0, 999, 1000, 2_500_000, 7e13)] == ["0 B", "999 B", "1.0 kB", "2.5 MB", "70.0 TB"]
    assert perplexity(1e6) == math.inf


def test_columns_are_aligned() -> None:
    assert aligned([("", "loss"), ("ann", "1"), ("b", "2")]) == ["     loss", "ann     1", "b       2"]


def test_a_line_ends_before_the_first_field_that_does_not_fit() -> None:
    fields = ["round 1/5", "a", "bcd"]
    assert [fitted(fields, width) for width in (17, 16, 12, 11)] == [
        "round 1/5  a  bcd",
        "round 1/5  a",
        "round 1/5  a",
        "round 1/5",
    ]


def test_a_number_that_is_not_whole_never_looks_whole() -> None:
    assert [plain_number(value) for value in (1.0, 0.0005, 123_456.7)] == ["1", "0.0005", "123456.7"]
    assert [plain_number(value) for value in (0.9999999, 1e-9)] == ["0.9999999", "1e-09"]


def test_long_virtual_times_have_larger_units_and_few_digits() -> None:
    shown = [virtual_duration(seconds) for seconds in (0.0, 999_999.0, 1e6, 1e8, 1e300)]
    assert shown == ["0.0 s", "999,999.0 s", "11.6 days", "3.2 years", "3.2e+292 years"]


@given(st.floats(0.01, 1e12), st.floats(1e-9, 1.0))
def test_a_duration_never_looks_like_the_limit_that_it_exceeds(limit: float, share: float) -> None:
    seconds = limit * (1 + share)
    assert virtual_duration(seconds, unlike=limit) != virtual_duration(limit, unlike=seconds)
