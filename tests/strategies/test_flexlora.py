"""FlexLoRA by hand, and against the dense singular value decomposition."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounds import Round, applied, by_hand, error, ideal, start

from fedsplit.federation.strategy import broadcast
from fedsplit.updates import Adapters, ClientInfo
from strategies.flexlora import FlexLoRA

SHAPES = {"linear": (12, 10, False), "conv": (9, 14, True)}


def test_the_largest_singular_value_is_shared_between_the_factors() -> None:
    """alpha 2, r 1: s = 2. Delta W* = 1/4 * 2 * diag(16, 0) + 3/4 * 2 * diag(0, 4) = diag(8, 6).

    Of it diag(8, 0) stays, which is 2 * B @ A with 8 / 2 = 4 shared evenly: A = [2, 0], B = [2, 0].
    """
    pairs = [([[1.0, 0.0]], [[16.0], [0.0]]), ([[0.0, 1.0]], [[0.0], [4.0]])]
    result = by_hand(FlexLoRA(), pairs, [1, 3], alpha=2.0)
    assert torch.allclose(result.tensors["l.lora_A.weight"], torch.tensor([[2.0, 0.0]]))
    assert torch.allclose(result.tensors["l.lora_B.weight"], torch.tensor([[2.0], [0.0]]))


def test_a_row_that_the_change_does_not_fill_is_taken_from_the_a_before() -> None:
    """alpha 2, r 2: s = 1. Delta W* = diag(4, 0), so A begins with [2, 0] and B with [2, 0].

    Of the A before, [[3, 0], [3, 5]], what is orthogonal to [1, 0] is [[0, 0], [0, 5]]: one direction of length 5.
    """
    pair = ([[1.0, 0.0], [0.0, 1.0]], [[4.0, 0.0], [0.0, 0.0]])
    before = ([[3.0, 0.0], [3.0, 5.0]], [[0.0, 0.0], [0.0, 0.0]])
    result = by_hand(FlexLoRA(), [pair], [1], alpha=2.0, before=before)
    assert torch.allclose(result.tensors["l.lora_A.weight"].abs(), torch.tensor([[2.0, 0.0], [0.0, 5.0]]))
    assert torch.allclose(result.tensors["l.lora_B.weight"], torch.tensor([[2.0, 0.0], [0.0, 0.0]]))


def test_clients_of_the_first_round_get_the_starts_rows() -> None:
    run = Round.begin(FlexLoRA(), start(rank=4))
    given = broadcast(run.strategy, run.state, run.adapters, ClientInfo(0, 2))
    assert given is not None
    for layer in run.adapters.complete:
        assert torch.equal(given.adapters.factors(layer)[0], run.adapters.factors(layer)[0][:2])
        assert not given.adapters.factors(layer)[1].any()


def test_where_nobody_moved_b_the_space_of_a_stays() -> None:
    run = Round.begin(FlexLoRA(), start(rank=3, shapes=SHAPES))
    before = run.adapters
    result = run.aggregate(run.train([2, 3], drift=0.0))
    for layer in before.complete:
        (old, _), (new, b) = before.factors(layer), result.factors(layer)
        assert torch.allclose(new.T @ new, old.T @ old, atol=1e-6)
        assert not b.any()


def best(whole: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(whole, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]


def missed(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    return sum(float((got[layer] - wanted[layer]).square().sum()) for layer in wanted) ** 0.5


mixed = st.lists(st.tuples(st.integers(1, 6), st.floats(0.1, 10)), min_size=1, max_size=6)


@settings(max_examples=25, deadline=None)
@given(clients=mixed, alpha=st.floats(0.5, 20), drift=st.floats(0.01, 3), seed=st.integers(0, 1000))
def test_every_rank_gets_the_nearest_matrix_of_its_rank(
    clients: list[tuple[int, float]], alpha: float, drift: float, seed: int
) -> None:
    """Eckart and Young: nothing of rank r is nearer than the dense SVD cut after r singular values."""
    ranks, weights = [rank for rank, _ in clients], [weight for _, weight in clients]
    run = Round.begin(FlexLoRA(), start(rank=6, alpha=alpha, shapes=SHAPES))
    for number in range(2):
        updates = run.train(ranks, weights, drift, seed + number)
        result = run.aggregate(updates)
        whole = ideal(updates)
        size = missed(whole, {layer: tensor * 0 for layer, tensor in whole.items()})
        assert missed(applied(result), {layer: best(tensor, 6) for layer, tensor in whole.items()}) < 1e-6 * size
        for rank in range(1, 7):
            given = broadcast(run.strategy, run.state, run.adapters, ClientInfo(0, rank))
            assert given is not None and {given.adapters.rank(layer) for layer in SHAPES} == {rank}
            wanted = {layer: best(tensor, rank) for layer, tensor in whole.items()}
            assert abs(missed(applied(given.adapters), whole) - missed(wanted, whole)) < 1e-6 * size


@settings(max_examples=25, deadline=None)
@given(ranks=st.lists(st.integers(1, 3), min_size=1, max_size=2), seed=st.integers(0, 1000))
def test_no_direction_dies_when_only_small_clients_answer(ranks: list[int], seed: int) -> None:
    """A keeps full rank, so that every direction has a gradient in B."""
    run = Round.begin(FlexLoRA(), start(rank=8, shapes=SHAPES))
    for number in range(3):
        result = run.aggregate(run.train(ranks, seed=seed + number))
        for layer in result.complete:
            a, _ = result.factors(layer)
            assert int(torch.linalg.matrix_rank(a.double(), rtol=1e-4)) == 8


def test_a_mean_change_that_fits_the_rank_is_exact() -> None:
    """Two clients of rank 2 together have rank 4 at most."""
    run = Round.begin(FlexLoRA(), start(rank=4, shapes=SHAPES))
    for number in range(3):
        updates = run.train([2, 2], [1.0, 5.0], seed=number)
        assert error(run.aggregate(updates), updates) < 1e-6


def test_the_clients_factors_do_not_matter_only_their_products_do() -> None:
    run = Round.begin(FlexLoRA(), start(rank=2, shapes=SHAPES))
    run.adapters = run.aggregate(run.train([2, 2]))
    updates = run.train([2, 2, 2])
    expected = applied(run.strategy.aggregate(run.state, run.adapters, updates)[1])
    mixing = torch.tensor([[2.0, 1.0], [0.0, 0.5]])

    def mixed_up(some: Adapters) -> Adapters:
        pairs = {layer: some.factors(layer) for layer in some.complete}
        return some.with_factors({layer: (mixing.inverse() @ a, b @ mixing) for layer, (a, b) in pairs.items()})

    updates = [replace(update, adapters=mixed_up(update.adapters)) for update in updates]
    got = applied(run.strategy.aggregate(run.state, run.adapters, updates)[1])
    assert all(torch.allclose(got[layer], expected[layer], rtol=1e-4, atol=1e-5) for layer in got)
