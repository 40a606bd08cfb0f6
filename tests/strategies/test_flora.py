"""FLoRA: everything goes into the base, and every round starts afresh."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounds import Round, by_hand, error, ideal, start

from fedsplit.federation.strategy import broadcast
from fedsplit.updates import Adapters, Assignment, ClientInfo, fresh_factor
from strategies.flora import FLoRA


def assigned(run: Round, rank: int, client: int = 0) -> Assignment:
    assignment = broadcast(run.strategy, run.state, run.adapters, ClientInfo(client, rank))
    assert assignment is not None and assignment.drawn is not None
    return assignment


@pytest.mark.parametrize("transposed", [False, True])
def test_the_stack_is_folded_by_hand(transposed: bool) -> None:
    """2 * (1 * [8, 0]^T [1, 2] + 3 * [0, 4]^T [5, -2]) / 4 = [[4, 8], [30, -12]], as (out, in) for Conv1D, too."""
    result = by_hand(
        FLoRA(),
        [([[1.0, 2.0]], [[8.0], [0.0]]), ([[5.0, -2.0]], [[0.0], [4.0]])],
        examples=[1, 3],
        alpha=2.0,
        transposed=transposed,
    )
    folded = result.folded["l"]
    assert torch.allclose(folded.up @ folded.down, torch.tensor([[4.0, 8.0], [30.0, -12.0]]), rtol=1e-6)
    assert result.tensors["l.lora_B.weight"].tolist() == [[0.0], [0.0]]


def test_ranks_have_scalings_of_their_own_by_hand() -> None:
    """Alpha 2: s = 2 at rank 1, 1 at rank 2; (2 * [1, 0]^T [1, 1] + 1 * I [[0, 2], [4, 0]]) / 2 = [[1, 2], [2, 0]]."""
    result = by_hand(
        FLoRA(),
        [([[1.0, 1.0]], [[1.0], [0.0]]), ([[0.0, 2.0], [4.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]])],
        examples=[1, 1],
        alpha=2.0,
        before=([[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]),
    )
    folded = result.folded["l"]
    assert torch.allclose(folded.up @ folded.down, torch.tensor([[1.0, 2.0], [2.0, 0.0]]), atol=1e-6)
    assert [factor.shape for factor in result.factors("l")] == [(2, 2), (2, 2)]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.floats(0.1, 9.0)), min_size=1, max_size=5),
    st.sampled_from([1.0, 3.0]),
    st.integers(0, 999),
)
def test_every_round_is_exact_for_any_ranks(clients: list[tuple[int, float]], alpha: float, seed: int) -> None:
    """The base after three rounds is the sum of what was wanted; the adapters add nothing to it."""
    ranks, weights = [rank for rank, _ in clients], [weight for _, weight in clients]
    run = Round.begin(FLoRA(seed), start(max(ranks), alpha))
    base = wanted = torch.zeros(())
    for _ in range(3):
        updates = run.train(ranks, weights, seed=seed)
        result = run.aggregate(updates)
        assert error(result, updates) < 1e-6
        assert all(change.rank <= sum(ranks) for change in result.folded.values())
        assert not any(factor.any() for layer in result.layers for factor in result.factors(layer)[1:])
        assert all(result.rank(layer) == max(ranks) for layer in result.layers)
        base = base + torch.cat(
            [(result.folded[n].up @ result.folded[n].down).flatten() for n in sorted(result.layers)]
        )
        wanted = wanted + torch.cat([matrix.flatten() for _, matrix in sorted(ideal(updates).items())])
    assert float((base - wanted).norm()) < 1e-6 * float(wanted.norm())


def test_clients_start_from_a_draw_that_need_not_be_sent() -> None:
    """At every rank and in every round, the first too: A as the seed says, B zero."""
    run = Round.begin(FLoRA(seed=7), start(rank=4))
    seen = [run.adapters]
    for _ in range(3):
        for rank in (1, 3, 4):
            assignment = assigned(run, rank)
            for layer in assignment.adapters.layers:
                a, b = assignment.adapters.factors(layer)
                assert torch.equal(a, fresh_factor(f"{layer}.lora_A.weight", (rank, a.shape[1]), assignment.drawn))
                assert not b.any() and b.shape[1] == rank
        seen.append(assigned(run, 4).adapters)
        run.aggregate(run.train([1, 3, 4]))
        assert all(torch.equal(t, assigned(run, 4).adapters.tensors[n]) for n, t in run.adapters.tensors.items())
    starts = [adapters.tensors["conv.lora_A.weight"] for adapters in seen]
    assert not any(torch.equal(one, other) for i, one in enumerate(starts) for other in starts[:i])


def test_the_draw_is_the_same_for_all_clients_and_differs_with_the_seed() -> None:
    one, other = (Round.begin(FLoRA(seed=seed), start()) for seed in (1, 2))
    assert assigned(one, 2, client=0).drawn == assigned(one, 2, client=5).drawn != assigned(other, 2).drawn


def test_the_stack_is_as_small_as_its_rank() -> None:
    """Four clients of the same two directions need no more than two; clients that moved nothing need none."""
    wide = {"linear": (20, 30, False), "conv": (24, 18, True)}
    run = Round.begin(FLoRA(), start(shapes=wide))
    (update,) = run.train([2])
    agreed = run.aggregate([replace(update, client=client) for client in range(4)])
    assert {change.rank for change in agreed.folded.values()} == {2}
    assert {change.rank for change in run.aggregate(run.train([2] * 4)).folded.values()} == {8}
    assert run.aggregate(run.train([2] * 4, drift=0.0)).folded == {}


def test_adapters_that_have_learnt_something_are_not_thrown_away() -> None:
    learnt = start()
    learnt = Adapters({name: tensor + 1 for name, tensor in learnt.tensors.items()}, learnt.layers)
    with pytest.raises(ValueError, match="FLoRA starts from B = 0"):
        FLoRA().init(learnt)


def test_what_is_no_factor_is_averaged() -> None:
    """(1 * 2 + 2 * 5) / 3 = 4, with clients of different ranks."""
    run, name = Round.begin(FLoRA(), start()), "linear.lora_magnitude_vector.weight"
    run.adapters = run.adapters.with_tensors({**run.adapters.tensors, name: torch.ones(6)})
    values = {0: 2.0, 1: 5.0}
    updates = [
        replace(u, adapters=u.adapters.with_tensors({**u.adapters.tensors, name: torch.full((6,), values[u.client])}))
        for u in run.train([1, 2])
    ]
    assert run.aggregate(updates).tensors[name].tolist() == [4.0] * 6
