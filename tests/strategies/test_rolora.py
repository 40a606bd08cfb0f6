"""RoLoRA: B in odd rounds, A in even ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounds import Round, applied, error, start

from fedsplit.federation.strategy import broadcast
from fedsplit.updates import Adapters, ClientInfo, ClientUpdate, Layer
from strategies.rolora import RoLoRA


def pair(a: list[list[float]], b: list[list[float]], transposed: bool) -> Adapters:
    tensors = {"l.lora_A.weight": torch.tensor(a), "l.lora_B.weight": torch.tensor(b)}
    return Adapters(tensors, {"l": Layer(2.0, transposed)})


@pytest.mark.parametrize("transposed", [False, True])
def test_two_rounds_by_hand(transposed: bool) -> None:
    """Round 1: B = (1 * [2, 0] + 3 * [6, 4]) / 4 = [5, 3]. Round 2: A = (1 * [5, -2] + 3 * [1, 2]) / 4 = [2, 1].

    Then s B A = 2 * [5, 3]^T [2, 1] = [[20, 10], [12, 6]].
    """
    run = Round.begin(RoLoRA(), pair([[1.0, 2.0]], [[0.0], [0.0]], transposed))
    first = [pair([[1.0, 2.0]], [[2.0], [0.0]], transposed), pair([[1.0, 2.0]], [[6.0], [4.0]], transposed)]
    result = run.aggregate([ClientUpdate(0, first[0], examples=1), ClientUpdate(1, first[1], examples=3)])
    assert [factor.tolist() for factor in result.factors("l")] == [[[1.0, 2.0]], [[5.0], [3.0]]]
    second = [pair([[5.0, -2.0]], [[5.0], [3.0]], transposed), pair([[1.0, 2.0]], [[5.0], [3.0]], transposed)]
    result = run.aggregate([ClientUpdate(0, second[0], examples=1), ClientUpdate(1, second[1], examples=3)])
    assert [factor.tolist() for factor in result.factors("l")] == [[[2.0, 1.0]], [[5.0], [3.0]]]
    assert applied(result)["l"].tolist() == [[20.0, 10.0], [12.0, 6.0]]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4),
    st.sampled_from([1.0, 3.0]),
    st.lists(st.floats(0.1, 9.0), min_size=1, max_size=5),
    st.integers(0, 999),
)
def test_every_round_is_exact_and_moves_one_factor_only(
    rank: int, alpha: float, weights: list[float], seed: int
) -> None:
    run = Round.begin(RoLoRA(), start(rank, alpha, seed=seed))
    for number in range(1, 5):
        before = run.adapters
        updates = run.train([rank] * len(weights), weights, seed=seed)
        result = run.aggregate(updates)
        assert error(result, updates) < 1e-6
        for layer in before.layers:
            a, b = (torch.equal(*both) for both in zip(result.factors(layer), before.factors(layer), strict=True))
            assert (a, b) == ((True, False) if number % 2 else (False, True))


def test_clients_are_told_whose_turn_it_is() -> None:
    run = Round.begin(RoLoRA(), start())
    turns = []
    for _ in range(4):
        assignment = broadcast(run.strategy, run.state, run.adapters, ClientInfo(0, 2))
        assert assignment is not None
        turns.append("".join(assignment.task.trains))
        run.aggregate(run.train([2, 2]))
    assert turns == ["B", "A", "B", "A"]


def test_a_frozen_factor_in_an_update_changes_nothing() -> None:
    run = Round.begin(RoLoRA(), start())
    for _ in range(2):
        updates = run.train([2, 2])
        turn = "B" if int(run.state["round"]) == 1 else "A"
        moved = [
            replace(
                u,
                adapters=u.adapters.with_tensors(
                    {n: t if f".lora_{turn}." in n else t + 1 for n, t in u.adapters.tensors.items()}
                ),
            )
            for u in updates
        ]
        expected = run.strategy.aggregate(run.state, run.adapters, updates)[1].tensors
        result = run.aggregate(moved).tensors
        assert all(torch.equal(tensor, expected[name]) for name, tensor in result.items())
