"""LoRA-FAIR by hand, and against dense least squares."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounds import SHAPES, Round, by_hand, error, ideal, start

from fedsplit.updates import weighted
from strategies.lora_fair import LoRAFAIR, correction
from strategies.mixed_ranks import padded_average

PAIRS = [([[4.0, 0.0]], [[4.0], [0.0]]), ([[0.0, 4.0]], [[0.0], [4.0]])]


def test_b_is_the_best_one_for_the_mean_a() -> None:
    """w = (1, 3) / 4: Abar = [1, 3], Bbar = [1, 3], Delta W* / s = diag(16, 0) / 4 + diag(0, 16) * 3/4 = diag(4, 12).

    Without a ridge B = diag(4, 12) Abar^T / (Abar Abar^T) = [4, 36] / 10.
    """
    result = by_hand(LoRAFAIR(ridge=1e-12), PAIRS, [1, 3], alpha=2.0)
    assert result.tensors["l.lora_A.weight"].tolist() == [[1.0, 3.0]]
    assert torch.allclose(result.tensors["l.lora_B.weight"], torch.tensor([[0.4], [3.6]]))


def test_the_ridge_is_a_part_of_the_mean_row_norm() -> None:
    """With ridge 1, lambda = 10: DeltaB = ([4, 36] - 10 * [1, 3]) / (10 + 10) = [-0.3, 0.3]."""
    result = by_hand(LoRAFAIR(ridge=1.0), PAIRS, [1, 3], alpha=2.0)
    assert torch.allclose(result.tensors["l.lora_B.weight"], torch.tensor([[0.7], [3.3]]))


def test_an_a_of_zeros_needs_no_correction() -> None:
    pairs = [([[1.0, 0.0]], [[2.0], [0.0]]), ([[-1.0, 0.0]], [[4.0], [0.0]])]
    result = by_hand(LoRAFAIR(), pairs, [1, 1], alpha=2.0)
    assert result.tensors["l.lora_B.weight"].tolist() == [[3.0], [0.0]]


@settings(max_examples=25, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    alpha=st.floats(0.5, 20),
    ridge=st.floats(1e-6, 1.0),
    drift=st.floats(0.05, 3),
    seed=st.integers(0, 1000),
)
def test_the_correction_is_the_dense_ridge_regression(
    ranks: list[int], alpha: float, ridge: float, drift: float, seed: int
) -> None:
    """Rows of sqrt(lambda) I beneath A make a plain least squares problem of it."""
    run = Round.begin(LoRAFAIR(ridge), start(rank=4, alpha=alpha))
    for number in range(2):
        updates = run.train(ranks, drift=drift, seed=seed + number)
        means = padded_average(run.adapters, *weighted(updates))
        result, whole = run.aggregate(updates), ideal(updates)
        for layer in SHAPES:
            a, b = means[layer]
            size = (ridge * float((a**2).sum()) / 4) ** 0.5
            missing = whole[layer] * 4 / alpha - b @ a
            wide = torch.cat([a, size * torch.eye(4, dtype=a.dtype)], dim=1)
            target = torch.cat([missing, torch.zeros(b.shape[0], 4, dtype=a.dtype)], dim=1)
            wanted = b + torch.linalg.lstsq(wide.T, target.T, driver="gelsd").solution.T
            assert torch.allclose(result.factors(layer)[0].double(), a, rtol=1e-6, atol=1e-7)
            scale = float(wanted.abs().max())
            assert torch.allclose(result.factors(layer)[1].double(), wanted, rtol=1e-5, atol=1e-5 * scale)


@settings(max_examples=25, deadline=None)
@given(
    clients=st.lists(st.tuples(st.integers(1, 4), st.floats(0.1, 10)), min_size=1, max_size=5),
    alpha=st.floats(0.5, 20),
    drift=st.floats(0.05, 3),
    seed=st.integers(0, 1000),
)
def test_it_is_never_further_off_than_the_means_alone(
    clients: list[tuple[int, float]], alpha: float, drift: float, seed: int
) -> None:
    ranks, weights = [rank for rank, _ in clients], [weight for _, weight in clients]
    run = Round.begin(LoRAFAIR(), start(rank=4, alpha=alpha))
    for number in range(2):
        updates = run.train(ranks, weights, drift, seed + number)
        plain = run.adapters.with_factors(padded_average(run.adapters, *weighted(updates)))
        assert error(run.aggregate(updates), updates) <= error(plain, updates) + 1e-6


def test_clients_that_share_a_are_aggregated_exactly() -> None:
    """Then the means' product is the mean of the products, and nothing is to be corrected."""
    run = Round.begin(LoRAFAIR(), start(rank=3))
    updates = run.train([3, 3, 3], [1.0, 2.0, 5.0])
    same = {name: tensor for name, tensor in updates[0].adapters.tensors.items() if "lora_A" in name}
    updates = [replace(u, adapters=u.adapters.with_tensors({**u.adapters.tensors, **same})) for u in updates]
    assert error(run.aggregate(updates), updates) < 1e-6


def test_the_correction_of_nothing_is_nothing() -> None:
    change = start(rank=2).change("linear")
    assert not correction(change.times(0.0), change.down, 1e-6).any()


@pytest.mark.parametrize("ridge", [0.0, -1.0, math.nan])
def test_an_impossible_ridge_is_refused(ridge: float) -> None:
    with pytest.raises(ValueError, match="ridge"):
        LoRAFAIR(ridge)
