"""FedSA-LoRA: A is shared, B never arrives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounds import Round, by_hand, start

from fedsplit.federation.strategy import traits_of
from fedsplit.updates import ClientUpdate
from strategies.fedsa_lora import FedSALoRA


def without_b(update: ClientUpdate) -> ClientUpdate:
    return ClientUpdate(update.client, update.adapters.only(frozenset("A")), update.examples, given=update.given)


def test_b_is_personal() -> None:
    assert traits_of(FedSALoRA()).personal == {"B"}


@pytest.mark.parametrize("change", [without_b, lambda update: update])
def test_a_is_averaged_by_hand_and_b_stays(change) -> None:
    """A = (1 * [1, 2] + 3 * [5, -2]) / 4 = [4, -1]; B is the global one, even if a client should send its own."""
    result = by_hand(
        FedSALoRA(),
        [([[1.0, 2.0]], [[2.0], [0.0]]), ([[5.0, -2.0]], [[6.0], [4.0]])],
        examples=[1, 3],
        alpha=2.0,
        before=([[0.0, 0.0]], [[0.5], [0.25]]),
        change=change,
    )
    assert result.tensors["l.lora_A.weight"].tolist() == [[4.0, -1.0]]
    assert result.tensors["l.lora_B.weight"].tolist() == [[0.5], [0.25]]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4),
    st.sampled_from([1.0, 3.0]),
    st.lists(st.floats(0.1, 9.0), min_size=1, max_size=5),
    st.integers(0, 999),
)
def test_with_its_own_b_every_client_gets_s_b_times_the_mean_of_a(
    rank: int, alpha: float, weights: list[float], seed: int
) -> None:
    """For any B_i, s B_i A = sum_j w_j s B_i A_j: what client i would have got from all A_j, had they met its B."""
    run = Round.begin(FedSALoRA(), start(rank, alpha, seed=seed))
    for _ in range(3):
        updates = run.train([rank] * len(weights), weights, seed=seed)
        assert not any(".lora_B." in name for update in updates for name in update.adapters.tensors)
        before, result = run.adapters, run.aggregate(updates)
        for layer in result.layers:
            own = torch.randn(result.factors(layer)[1].shape, dtype=torch.float64)
            s = alpha / rank
            wanted = sum(
                weight / sum(weights) * s * own @ update.adapters.tensors[f"{layer}.lora_A.weight"].double()
                for weight, update in zip(weights, updates, strict=True)
            )
            a, b = result.factors(layer)
            assert float((s * own @ a.double() - wanted).norm()) < 1e-6 * float(wanted.norm())
            assert torch.equal(b, before.factors(layer)[1])
