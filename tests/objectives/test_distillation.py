"""Distillation from the base model, against the definition."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fedsplit.model.kernels import IGNORED
from fedsplit.objectives.distillation import Distillation
from fedsplit.objectives.objective import demands_of

GENERATOR = torch.Generator().manual_seed(2)
LOGITS, BASE = torch.randn(2, 3, 5, generator=GENERATOR), torch.randn(2, 3, 5, generator=GENERATOR)
LABELS = torch.tensor([[1, IGNORED, 2], [IGNORED, 3, 4]])


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_loss_is_that_of_the_definition(alpha: float, temperature: float) -> None:
    nats, divergences = [], []
    for row, place in [(0, 0), (0, 2), (1, 1), (1, 2)]:
        tuned, base = LOGITS[row, place], BASE[row, place]
        nats.append(-tuned.log_softmax(-1)[LABELS[row, place]])
        p = (base / temperature).softmax(-1)
        divergences.append((p * (p.log() - (tuned / temperature).log_softmax(-1))).sum())
    expected = (1 - alpha) * torch.stack(nats).mean() + alpha * temperature**2 * torch.stack(divergences).mean()
    assert torch.allclose(Distillation(alpha, temperature)(LOGITS, LABELS, BASE), expected, atol=1e-6)


def test_without_a_share_of_the_base_it_is_cross_entropy_and_close_to_the_base_it_costs_nothing() -> None:
    plain = functional.cross_entropy(LOGITS.flatten(0, 1), LABELS.flatten())
    assert torch.allclose(Distillation(0.0)(LOGITS, LABELS, BASE), plain)
    assert float(Distillation(1.0)(BASE, LABELS, BASE)) == pytest.approx(0, abs=1e-7)


def test_it_asks_for_the_base_model() -> None:
    demands = demands_of(Distillation())
    assert (demands.compares, demands.mean_over) == (True, "labels")


@pytest.mark.parametrize("options", [{"alpha": 1.5}, {"alpha": -0.1}, {"temperature": 0.0}])
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
        Distillation(**options)
