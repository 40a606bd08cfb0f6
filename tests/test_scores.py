"""Scores by hand."""

from __future__ import annotations

import pytest

from fedsplit.scores import Score, pooled


def test_means_are_over_all_that_was_predicted() -> None:
    """Six nats on three tokens and one on one: 7 / 4, not the mean of 2 and 1."""
    both = pooled([Score(6.0, 3, 2), Score(1.0, 1, 1)])
    assert both == Score(7.0, 4, 3)
    assert both.loss == pytest.approx(1.75) and both.accuracy == 0.75


def test_nothing_is_no_tokens() -> None:
    assert pooled([]) == Score(0.0, 0, 0)
    assert pooled([Score(), Score(2.0, 1)]) == Score(2.0, 1)
