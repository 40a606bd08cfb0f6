"""AdaLoRA's regulariser as a gradient stage."""

from __future__ import annotations

import pytest
import torch

from fedsplit.adaptation.rank_budget import RankBudget
from fedsplit.optimization.orthogonality import Orthogonality
from fedsplit.stages import LocalStep

Q, P, SINGULAR, OTHER = "l.lora_A", "l.lora_B", "l.lora_E", "other.lora_A"
BUDGET = RankBudget(orth_reg_weight=0.5, layers=3)
PARAMETERS = {
    Q: torch.tensor([[2.0, 0.0]]),
    P: torch.eye(3)[:, :1],
    SINGULAR: torch.ones(1, 1),
    OTHER: torch.tensor([[2.0, 0.0]]),
}


def test_a_parts_factors_are_pulled_and_nothing_else() -> None:
    """As for Q = (2, 0) by hand: 0.5 / 6 * 4. A factor of another part is left alone."""
    gradients = {name: torch.ones_like(tensor) for name, tensor in PARAMETERS.items()}
    found = Orthogonality({Q, P, SINGULAR}, BUDGET)(gradients, LocalStep(PARAMETERS))
    assert found[Q].tolist() == [[pytest.approx(1 + 0.5 / 6 * 4), 1.0]]
    assert all(torch.equal(found[name], gradients[name]) for name in (P, SINGULAR, OTHER))
    assert list(found) == list(gradients)


def test_a_factor_without_a_gradient_gets_none() -> None:
    gradients = {SINGULAR: torch.ones(1, 1)}
    assert Orthogonality(PARAMETERS.keys(), BUDGET)(gradients, LocalStep(PARAMETERS)).keys() == {SINGULAR}


def test_a_share_of_the_regulariser_is_that_share_of_its_gradient() -> None:
    gradients = {Q: torch.zeros(1, 2)}
    whole, half = (Orthogonality({Q}, BUDGET, share)(gradients, LocalStep(PARAMETERS))[Q] for share in (1.0, 0.5))
    assert whole.any() and torch.equal(half * 2, whole)


def test_without_a_budget_of_ranks_nothing_changes() -> None:
    gradients = {Q: torch.ones(1, 2)}
    assert Orthogonality({Q}, None)(gradients, LocalStep(PARAMETERS)) is gradients
