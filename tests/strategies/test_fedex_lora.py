"""FedEx-LoRA: FedAvg, made exact by a residual of bounded rank."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounds import Round, applied, by_hand, error, ideal, start

from strategies.fedavg import FedAvg
from strategies.fedex_lora import FedExLoRA

WIDE = {"linear": (40, 30, False), "conv": (24, 36, True)}
"""Wider than any rank here, so that no rank is bounded by a width."""
WEIGHTS = st.lists(st.floats(0.1, 9.0), min_size=1, max_size=5)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_residual_by_hand(transposed: bool) -> None:
    """Abar = [4, -1], Bbar = [2, 3], s Bbar Abar = [[16, -4], [24, -6]], and Delta W* = [[4, 8], [30, -12]].

    What is left is [[-12, 12], [6, -6]], which is also 2 * (1/4 [6, -3]^T [-3, 3] + 3/4 [-2, 1]^T [1, -1]).
    """
    result = by_hand(
        FedExLoRA(),
        [([[1.0, 2.0]], [[8.0], [0.0]]), ([[5.0, -2.0]], [[0.0], [4.0]])],
        examples=[1, 3],
        alpha=2.0,
        transposed=transposed,
    )
    assert [factor.tolist() for factor in result.factors("l")] == [[[4.0, -1.0]], [[2.0], [3.0]]]
    folded = result.folded["l"]
    assert folded.rank == 1
    assert torch.allclose(folded.up @ folded.down, torch.tensor([[-12.0, 12.0], [6.0, -6.0]]), rtol=1e-6)


def test_ranks_are_brought_to_the_largest_by_hand() -> None:
    """Alpha 2: s = 2 at rank 1, 1 at rank 2. B of the first is [1, 0] at rank 1, so [2, 0] and zeros at rank 2.

    Abar = [[1, 1] + [0, 2], [0, 0] + [4, 0]] / 2 = [[.5, 1.5], [2, 0]], Bbar = [[2 + 1, 0], [0, 1]] / 2; their product
    is [[.75, 2.25], [1, 0]], Delta W* = (2 * [[1, 1], [0, 0]] + [[0, 2], [4, 0]]) / 2 = [[1, 2], [2, 0]].
    """
    result = by_hand(
        FedExLoRA(),
        [([[1.0, 1.0]], [[1.0], [0.0]]), ([[0.0, 2.0], [4.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]])],
        examples=[1, 1],
        alpha=2.0,
        before=([[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]),
    )
    assert result.tensors["l.lora_A.weight"].tolist() == [[0.5, 1.5], [2.0, 0.0]]
    assert result.tensors["l.lora_B.weight"].tolist() == [[1.5, 0.0], [0.0, 0.5]]
    folded = result.folded["l"]
    assert torch.allclose(folded.up @ folded.down, torch.tensor([[0.25, -0.25], [1.0, 0.0]]), atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.sampled_from([1.0, 5.0]), WEIGHTS, st.floats(0.01, 2.0), st.integers(0, 999))
def test_every_round_is_exact_with_a_residual_of_rank_n_minus_1_times_r(
    rank: int, alpha: float, weights: list[float], drift: float, seed: int
) -> None:
    run = Round.begin(FedExLoRA(), start(rank, alpha, WIDE))
    for _ in range(3):
        updates = run.train([rank] * len(weights), weights, drift, seed)
        result = run.aggregate(updates)
        assert error(result, updates) < 2e-7
        ranks = {result.folded[layer].rank if layer in result.folded else 0 for layer in WIDE}
        assert ranks == {(len(weights) - 1) * rank}


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.floats(0.1, 9.0)), min_size=1, max_size=5),
    st.sampled_from([1.0, 5.0]),
    st.integers(0, 999),
)
def test_every_round_is_exact_for_any_ranks(clients: list[tuple[int, float]], alpha: float, seed: int) -> None:
    ranks, weights = [rank for rank, _ in clients], [weight for _, weight in clients]
    run = Round.begin(FedExLoRA(), start(max(ranks), alpha, WIDE))
    for _ in range(3):
        updates = run.train(ranks, weights, seed=seed)
        result = run.aggregate(updates)
        assert error(result, updates) < 2e-7
        most = min(sum(ranks), (len(ranks) - 1) * max(ranks))
        assert all(change.rank <= most for change in result.folded.values())


def test_the_factors_are_fedavgs() -> None:
    run = Round.begin(FedExLoRA(), start())
    updates = run.train([2] * 4)
    expected = FedAvg().aggregate({}, run.adapters, updates)[1].tensors
    assert all(torch.equal(tensor, expected[name]) for name, tensor in run.aggregate(updates).tensors.items())


def test_nothing_is_folded_where_averaging_is_exact() -> None:
    """One client; several that agree; several that differ in B alone, but for the rounding of its mean."""
    run = Round.begin(FedExLoRA(), start(shapes=WIDE))
    one = run.train([2])
    agree = [replace(one[0], client=client, examples=client + 1) for client in range(3)]
    common = run.adapters
    only_b = [
        replace(
            u, adapters=u.adapters.with_factors({n: (common.factors(n)[0], u.adapters.factors(n)[1]) for n in WIDE})
        )
        for u in run.train([2] * 3)
    ]
    for updates in (one, agree, only_b):
        result = run.strategy.aggregate({}, common, updates)[1]
        assert result.folded == {} and error(result, updates) < 1e-6


def test_the_bound_on_the_rank_holds_where_the_ranks_of_the_factors_nearly_cancel() -> None:
    """B A = b a^T - b a^T, nearly: the rounding of the averages is far from small beside it, but is not sent."""
    run = Round.begin(FedExLoRA(), start(shapes=WIDE))
    pairs = {layer: run.adapters.factors(layer) for layer in WIDE}
    opposed = {layer: (torch.cat([a[:1], -a[:1]]), torch.ones_like(b)) for layer, (a, b) in pairs.items()}
    run.adapters = run.adapters.with_factors(opposed)
    updates = run.train([2, 2], drift=1e-3)
    result = run.aggregate(updates)
    assert {change.rank for change in result.folded.values()} == {2}
    assert error(result, updates) < 1e-4


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 7), st.integers(0, 999))
def test_a_truncated_residual_misses_what_eckart_and_young_say(limit: int, seed: int) -> None:
    """Four clients of rank 2 leave a residual of rank 6; a limit at or beyond it changes nothing."""
    run = Round.begin(FedExLoRA(rank=limit), start(shapes=WIDE))
    updates = run.train([2] * 4, seed=seed)
    wanted, result = ideal(updates), run.aggregate(updates)
    averaged = applied(result.with_tensors(result.tensors))
    for layer in WIDE:
        assert result.folded[layer].rank == min(limit, 6)
        missing = float(torch.linalg.svdvals(wanted[layer] - averaged[layer])[limit:].norm())
        missed = float((wanted[layer] - applied(result)[layer]).norm())
        assert missed == pytest.approx(missing, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("rank", [-1, 1.5, "2"])
def test_a_limit_that_is_none_is_refused(rank) -> None:
    with pytest.raises(ValueError, match=r"rank is .*; allowed: a whole number"):
        FedExLoRA(rank=rank)
