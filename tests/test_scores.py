"""Scores by hand."""

from __future__ import annotations

import pytest

from fedsplit.scores import Score, means, means_by_metric, pooled


def test_means_are_over_tokens_not_over_batches() -> None:
    batches = [Score(1.0 * 8, 8), Score(4.0 * 4, 4)]
    assert pooled(batches).loss == 2.0


def test_metrics_add_up_by_name_and_nothing_measured_has_no_mean() -> None:
    both = pooled([Score(metrics={"a": (1.0, 2.0)}), Score(metrics={"a": (2.0, 2.0), "b": (0.0, 0.0)})])
    assert both.metrics == {"a": (3.0, 4.0), "b": (0.0, 0.0)}
    many = {name: (1.0, 1.0) for name in "zyxwvutsrqponm"}
    assert list(pooled([Score(metrics=many), Score(metrics=many)]).metrics) == [*many], "in the order of the setting"
    assert means(both.metrics) == {"a": 0.75, "b": None}
    by_owner = means_by_metric([("ann", {"a": (1.0, 2.0)}), ("bob", {"a": (0.0, 0.0), "b": (1.0, 1.0)})])
    assert by_owner == {"a": {"ann": 0.5, "bob": None}, "b": {"bob": 1.0}}


def test_means_are_over_all_that_was_predicted() -> None:
    """Six nats on three tokens and one on one: 7 / 4, not the mean of 2 and 1."""
    both = pooled([Score(6.0, 3, 2), Score(1.0, 1, 1)])
    assert both == Score(7.0, 4, 3)
    assert both.loss == pytest.approx(1.75) and both.accuracy == 0.75


def test_nothing_is_no_tokens() -> None:
    assert pooled([]) == Score(0.0, 0, 0)
    assert pooled([Score(), Score(2.0, 1)]) == Score(2.0, 1)
