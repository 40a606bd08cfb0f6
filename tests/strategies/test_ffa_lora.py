"""FFA-LoRA: B is averaged, A is never touched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounds import Round, applied, by_hand, error, start

from fedsplit.federation.strategy import broadcast
from fedsplit.updates import ClientInfo
from strategies.ffa_lora import FFALoRA


@pytest.mark.parametrize("transposed", [False, True])
def test_b_is_averaged_by_hand(transposed: bool) -> None:
    """B = (1 * [2, 0] + 3 * [6, 4]) / 4 = [5, 3]; s B A = 2 * [5, 3]^T [1, 2] = [[10, 20], [6, 12]]."""
    result = by_hand(
        FFALoRA(),
        [([[1.0, 2.0]], [[2.0], [0.0]]), ([[1.0, 2.0]], [[6.0], [4.0]])],
        examples=[1, 3],
        alpha=2.0,
        before=([[1.0, 2.0]], [[0.0], [0.0]]),
        transposed=transposed,
    )
    assert result.tensors["l.lora_A.weight"].tolist() == [[1.0, 2.0]]
    assert result.tensors["l.lora_B.weight"].tolist() == [[5.0], [3.0]]
    assert applied(result)["l"].tolist() == [[10.0, 20.0], [6.0, 12.0]]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4),
    st.sampled_from([1.0, 3.0]),
    st.lists(st.floats(0.1, 9.0), min_size=1, max_size=5),
    st.integers(0, 999),
)
def test_every_round_is_exact_and_a_keeps_its_bits(rank: int, alpha: float, weights: list[float], seed: int) -> None:
    begin = start(rank, alpha, seed=seed)
    run = Round.begin(FFALoRA(), begin)
    for _ in range(3):
        updates = run.train([rank] * len(weights), weights, seed=seed)
        result = run.aggregate(updates)
        assert error(result, updates) < 1e-6
        assert all(torch.equal(result.factors(layer)[0], begin.factors(layer)[0]) for layer in begin.layers)


def test_clients_are_told_to_train_b_only() -> None:
    strategy, adapters = FFALoRA(), start()
    assignment = broadcast(strategy, strategy.init(adapters), adapters, ClientInfo(3, 2))
    assert assignment is not None and assignment.task.trains == {"B"}
    assert all(torch.equal(tensor, adapters.tensors[name]) for name, tensor in assignment.adapters.tensors.items())


def test_another_a_in_an_update_changes_nothing() -> None:
    run = Round.begin(FFALoRA(), start())
    updates = run.train([2, 2])
    moved = [
        replace(
            u,
            adapters=u.adapters.with_factors(
                {"conv": (u.adapters.factors("conv")[0] + 1, u.adapters.factors("conv")[1])}
            ),
        )
        for u in updates
    ]
    expected, result = (run.strategy.aggregate({}, run.adapters, us)[1].tensors for us in (updates, moved))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in result.items())


def test_what_is_no_factor_is_averaged() -> None:
    """(1 * 2 + 2 * 5) / 3 = 4."""
    run, name = Round.begin(FFALoRA(), start()), "linear.lora_magnitude_vector.weight"
    run.adapters = run.adapters.with_tensors({**run.adapters.tensors, name: torch.ones(6)})
    values = {0: 2.0, 1: 5.0}
    updates = [
        replace(u, adapters=u.adapters.with_tensors({**u.adapters.tensors, name: torch.full((6,), values[u.client])}))
        for u in run.train([2, 2])
    ]
    assert run.aggregate(updates).tensors[name].tolist() == [4.0] * 6
