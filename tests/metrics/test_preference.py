"""Accuracy and margin of preferences, by hand."""

from __future__ import annotations

import pytest
import torch

from fedsplit.metrics.metric import asked_by, load_metrics, measure
from fedsplit.metrics.preference import PREFERENCE, PreferenceAccuracy, PreferenceMargin, pair_score
from fedsplit.objectives.dpo import DPO

LOGITS = torch.tensor([[[2.0, 0.0]], [[2.0, 0.0]], [[0.0, 1.0]], [[0.0, 1.0]]])
LABELS = torch.tensor([[0], [1], [0], [1]])
BASE = torch.zeros(4, 1, 2)


def test_of_two_pairs_one_is_preferred_rightly() -> None:
    """Log-ratios differ by 2 for the first pair, by -1 for the second."""
    assert PreferenceAccuracy()(LOGITS, LABELS, BASE) == (1.0, 2.0)
    total, count = PreferenceMargin(beta=0.5)(LOGITS, LABELS, BASE)
    assert (total, count) == (pytest.approx(0.5 * (2 - 1)), 2.0)


def test_a_model_that_is_its_base_prefers_nothing() -> None:
    assert PreferenceAccuracy()(LOGITS, LABELS, LOGITS) == (0.0, 2.0)
    assert PreferenceMargin()(LOGITS, LABELS, LOGITS) == (0.0, 2.0)


def test_the_score_of_pairs_is_the_objectives() -> None:
    metrics = load_metrics(PREFERENCE, {})
    assert asked_by(*metrics.values()) == {"reference"}
    objective, further = DPO(0.5), {"reference": BASE, "mask": LABELS >= 0}
    found = pair_score(objective, metrics, LOGITS, LABELS, further)
    assert found.tokens == 2
    assert found.loss == pytest.approx(float(objective(LOGITS, LABELS, BASE)))
    assert found.metrics == measure(metrics, LOGITS, LABELS, further)
