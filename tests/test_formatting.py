"""Numbers and tables for people."""

from __future__ import annotations

import math

from fedsplit.formatting import aligned, fitted, perplexity, size


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
