"""What a setting may be."""

from __future__ import annotations

import pytest

from fedsplit.settings.validators import above, at_least, below, one_of


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
