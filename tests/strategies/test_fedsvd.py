"""FedSVD by hand; exactness; and what A looks like afterwards."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounds import SHAPES, Round, by_hand, error, start

from fedsplit.federation.strategy import broadcast
from fedsplit.updates import ClientInfo
from strategies.fedsvd import FedSVD


def test_the_length_of_a_moves_into_b() -> None:
    """A = [3, 4]; Bbar = (1 * [5, 0] + 3 * [1, 0]) / 4 = [2, 0]; their product's only singular value is 2 * 5."""
    pairs = [([[3.0, 4.0]], [[5.0], [0.0]]), ([[3.0, 4.0]], [[1.0], [0.0]])]
    result = by_hand(FedSVD(), pairs, [1, 3], alpha=3.0)
    assert torch.allclose(result.tensors["l.lora_A.weight"], torch.tensor([[0.6, 0.8]]))
    assert torch.allclose(result.tensors["l.lora_B.weight"], torch.tensor([[10.0], [0.0]]))


def test_a_direction_that_b_does_not_use_stays() -> None:
    """A = [[0, 2], [2, 0]], B = [[0, 3], [0, 0]]: their product is diag(6, 0), so [1, 0] comes first, then [0, 1]."""
    pair = ([[0.0, 2.0], [2.0, 0.0]], [[0.0, 3.0], [0.0, 0.0]])
    result = by_hand(FedSVD(), [pair], [1], alpha=3.0)
    assert torch.allclose(result.tensors["l.lora_A.weight"], torch.eye(2))
    assert torch.allclose(result.tensors["l.lora_B.weight"], torch.tensor([[6.0, 0.0], [0.0, 0.0]]))


def test_only_b_trains_and_the_first_round_has_the_starts_a() -> None:
    begin = start(rank=2)
    given = broadcast(FedSVD(), {}, begin, ClientInfo(0, 2))
    assert given is not None and given.task.trains == {"B"}
    assert all(torch.equal(tensor, begin.tensors[name]) for name, tensor in given.adapters.tensors.items())


def projector(a: torch.Tensor) -> torch.Tensor:
    """The orthogonal projection on the row space."""
    return torch.linalg.pinv(a.double()) @ a.double()


@settings(max_examples=25, deadline=None)
@given(
    rank=st.integers(1, 4),
    weights=st.lists(st.floats(0.1, 10), min_size=1, max_size=5),
    alpha=st.floats(0.5, 20),
    drift=st.floats(0.01, 3),
    seed=st.integers(0, 1000),
)
def test_it_is_exact_and_a_has_orthonormal_rows_in_the_same_space(
    rank: int, weights: list[float], alpha: float, drift: float, seed: int
) -> None:
    begin = start(rank=rank, alpha=alpha)
    run = Round.begin(FedSVD(), begin)
    for number in range(3):
        updates = run.train([rank] * len(weights), weights, drift, seed + number)
        result = run.aggregate(updates)
        assert error(result, updates) < 1e-6
        for layer in SHAPES:
            a, b = (factor.double() for factor in result.factors(layer))
            assert torch.allclose(a @ a.T, torch.eye(rank, dtype=a.dtype), atol=1e-6)
            assert torch.allclose(projector(a), projector(begin.factors(layer)[0]), atol=1e-5)
            gram = b.T @ b
            assert torch.allclose(gram, torch.diag(gram.diag()), atol=1e-5 * float(gram.max()))
            assert bool((gram.diag().diff() <= 1e-6 * gram.max()).all())


def test_where_nobody_moved_b_there_is_a_basis_all_the_same() -> None:
    begin = start(rank=3)
    run = Round.begin(FedSVD(), begin)
    result = run.aggregate(run.train([3, 3], drift=0.0))
    for layer in SHAPES:
        a, b = result.factors(layer)
        assert not b.any()
        assert torch.allclose(a @ a.T, torch.eye(3), atol=1e-6)
        assert torch.allclose(projector(a), projector(begin.factors(layer)[0]), atol=1e-5)


def test_a_layer_may_have_fewer_outputs_than_the_rank() -> None:
    run = Round.begin(FedSVD(), start(rank=4, shapes={"l": (2, 9, False)}))
    for _ in range(2):
        updates = run.train([4, 4], [1.0, 3.0])
        result = run.aggregate(updates)
        a, _ = result.factors("l")
        assert torch.allclose(a @ a.T, torch.eye(4), atol=1e-6)
        assert error(result, updates) < 1e-6


def test_a_second_time_changes_nothing() -> None:
    """Clients that return what they were given get it back: A does not turn or flip from round to round."""
    run = Round.begin(FedSVD(), start(rank=3))
    before = run.aggregate(run.train([3, 3]))
    after = run.aggregate(run.train([3, 3], drift=0.0))
    assert all(torch.allclose(tensor, before.tensors[name], atol=1e-5) for name, tensor in after.tensors.items())
