"""FedRot-LoRA by hand, Procrustes' optimum, and clients that differ by a rotation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounds import SHAPES, Round, applied, by_hand, error, start

from fedsplit.updates import Adapters, ClientUpdate, Layer
from strategies.fedavg import FedAvg
from strategies.fedrot_lora import FedRotLoRA, procrustes, rotation_to

PAIRS = [
    ([[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 2.0]]),
    ([[0.0, 1.0], [-1.0, 0.0]], [[0.0, -1.0], [2.0, 0.0]]),
]
"""(A, B) = (I, D) and (Q^T I, D Q) with D = diag(1, 2) and Q = [[0, -1], [1, 0]]: the same product D."""


def test_a_quarter_turn_is_turned_back() -> None:
    """The reference is A = I, so R_1 = I and R_2 = A_2 = Q^T: R_2^T A_2 = Q Q^T = I and B_2 R_2 = D Q Q^T = D."""
    before = ([[1.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]])
    result = by_hand(FedRotLoRA("A"), PAIRS, [1, 3], alpha=6.0, before=before)
    assert torch.allclose(result.tensors["l.lora_A.weight"], torch.eye(2), atol=1e-7)
    assert torch.allclose(result.tensors["l.lora_B.weight"], torch.tensor([[1.0, 0.0], [0.0, 2.0]]), atol=1e-7)
    plain = by_hand(FedAvg(), PAIRS, [1, 3], alpha=6.0, before=before)
    assert float(applied(plain)["l"][0, 0]) < 0.7 * float(applied(result)["l"][0, 0])


def test_a_reference_of_zeros_rotates_nothing() -> None:
    """In the first round B is aligned, and it starts at zero: FedAvg's means, (1 * I + 3 * Q^T) / 4 for A."""
    before = ([[1.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]])
    for align in ("alternate", "B"):
        result = by_hand(FedRotLoRA(align), PAIRS, [1, 3], alpha=6.0, before=before)
        assert torch.allclose(result.tensors["l.lora_A.weight"], torch.tensor([[0.25, 0.75], [-0.75, 0.25]]), atol=1e-7)


def test_both_adds_the_two_products() -> None:
    """A A_ref^T = [[0, 3], [0, 0]] alone leaves R open; with B^T B_ref = [[0, 0], [-2, 0]] it is [[0, 1], [-1, 0]]."""
    a, b = torch.tensor([[3.0], [0.0]]), torch.tensor([[0.0, -2.0]])
    reference = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0, 0.0]])
    assert torch.allclose(rotation_to(reference, a, b, "both"), torch.tensor([[0.0, 1.0], [-1.0, 0.0]]).double())


def test_half_the_strength_is_half_the_angle() -> None:
    """From Q^T to I is a quarter turn; half of it is the turn by 45 degrees, with entries +- 1 / sqrt(2)."""
    (_, _), (a, b) = ((torch.tensor(a), torch.tensor(b)) for a, b in PAIRS)
    reference = torch.eye(2), torch.zeros(2, 2)
    expected = torch.tensor([[1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64) / 2**0.5
    assert torch.allclose(rotation_to(reference, a, b, "A", 0.5), expected)


def test_halfway_to_a_reflection_nothing_is_rotated() -> None:
    """(I + diag(1, -1)) / 2 = diag(1, 0) leaves the second sign open."""
    reference = torch.eye(2), torch.zeros(2, 2)
    a = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    for strength, sign in ((0.4, 1.0), (0.5, 1.0), (0.6, -1.0), (1.0, -1.0)):
        got = rotation_to(reference, a, torch.zeros(2, 2), "A", strength)
        assert torch.allclose(got, torch.tensor([[1.0, 0.0], [0.0, sign]], dtype=torch.float64))


def test_no_strength_is_fedavg() -> None:
    before = ([[1.0, 2.0], [0.0, 1.0]], [[1.0, 0.0], [3.0, 1.0]])
    got, plain = (by_hand(s, PAIRS, [1, 3], 6.0, before) for s in (FedRotLoRA("A", strength=0.0), FedAvg()))
    assert all(torch.allclose(tensor, plain.tensors[name]) for name, tensor in got.tensors.items())


seeds = st.integers(0, 1000)


def orthogonal(size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 6), rank=st.integers(0, 6), seed=seeds)
def test_procrustes_is_orthogonal_and_the_optimum(size: int, rank: int, seed: int) -> None:
    """trace(R^T M) of an orthogonal R is at most the sum of M's singular values, and that is reached."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(size, min(rank, size), generator=generator, dtype=torch.float64)
    cross = left @ torch.randn(min(rank, size), size, generator=generator, dtype=torch.float64)
    rotation = procrustes(cross)
    assert torch.allclose(rotation.T @ rotation, torch.eye(size, dtype=torch.float64), atol=1e-9)
    most = float(torch.linalg.svdvals(cross).sum())
    assert float((rotation * cross).sum()) == pytest.approx(most, rel=1e-5, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(size=st.integers(2, 6), known=st.integers(0, 5), seed=seeds)
def test_what_the_reference_says_nothing_of_is_not_rotated(size: int, known: int, seed: int) -> None:
    known, basis = min(known, size), orthogonal(size, seed)
    cross, expected = torch.zeros(size, size, dtype=torch.float64), torch.eye(size, dtype=torch.float64)
    cross[:known, :known] = expected[:known, :known] = orthogonal(known, seed + 1)
    assert torch.allclose(procrustes(basis @ cross @ basis.T), basis @ expected @ basis.T, atol=1e-9)


def turned(adapters: Adapters, rotations: dict[str, torch.Tensor]) -> Adapters:
    pairs = {layer: adapters.factors(layer) for layer in rotations}
    return adapters.with_factors(
        {layer: (q.T @ pairs[layer][0].double(), pairs[layer][1].double() @ q) for layer, q in rotations.items()}
    )


def warm(strategy: FedRotLoRA, rank: int, alpha: float, seed: int) -> Round:
    """A run after a round, so that B is no longer zero."""
    run = Round.begin(strategy, start(rank=rank, alpha=alpha))
    run.aggregate(run.train([rank] * 3, seed=seed))
    return run


@settings(max_examples=40, deadline=None)
@given(
    align=st.sampled_from(["A", "B", "both", "alternate"]),
    rank=st.integers(1, 4),
    alpha=st.floats(0.5, 20),
    weights=st.lists(st.floats(0.1, 10), min_size=2, max_size=5),
    seed=seeds,
)
def test_clients_that_differ_by_a_rotation_are_aggregated_exactly(
    align: str, rank: int, alpha: float, weights: list[float], seed: int
) -> None:
    run = warm(FedRotLoRA(align), rank, alpha, seed)
    (first,) = run.train([rank], drift=0.2, seed=seed)
    updates = [
        replace(
            first,
            client=client,
            weight=weight,
            adapters=turned(first.adapters, {layer: orthogonal(rank, seed + 10 * client) for layer in SHAPES}),
        )
        for client, weight in enumerate(weights)
    ]
    assert error(run.aggregate(updates), updates) < 2e-6


def test_fedavg_does_not_aggregate_them_exactly() -> None:
    run = warm(FedRotLoRA(), 3, 2.0, 0)
    (first,) = run.train([3], drift=0.2)
    updates = [
        replace(first, client=c, adapters=turned(first.adapters, {layer: orthogonal(3, c) for layer in SHAPES}))
        for c in range(2)
    ]
    assert error(FedAvg().aggregate({}, run.adapters, updates)[1], updates) > 0.1


@settings(max_examples=25, deadline=None)
@given(align=st.sampled_from(["A", "B", "both"]), rank=st.integers(1, 5), seed=seeds)
def test_a_client_keeps_its_product_and_comes_nearest(align: str, rank: int, seed: int) -> None:
    """No other orthogonal matrix brings it nearer, the identity neither."""
    generator = torch.Generator().manual_seed(seed)
    a, a_ref = (torch.randn(rank, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    b, b_ref = (torch.randn(6, rank, generator=generator, dtype=torch.float64) for _ in range(2))

    def distance(r: torch.Tensor) -> float:
        of_a, of_b = float(((r.T @ a - a_ref) ** 2).sum()), float(((b @ r - b_ref) ** 2).sum())
        return {"A": of_a, "B": of_b, "both": of_a + of_b}[align]

    rotation = rotation_to((a_ref, b_ref), a, b, align)
    assert torch.allclose((b @ rotation) @ (rotation.T @ a), b @ a)
    others = [torch.eye(rank, dtype=torch.float64), *(orthogonal(rank, seed + k) for k in range(20))]
    assert all(distance(rotation) <= distance(other) + 1e-9 for other in others)


def test_the_two_factors_take_turns() -> None:
    """B in the first and third round, A in the second and fourth."""
    run = Round.begin(FedRotLoRA(), start(rank=3))
    for number, align in enumerate("BABA"):
        updates, before = run.train([3, 3], [1.0, 2.0], drift=2.0), run.adapters
        result = run.aggregate(updates)
        for other in "AB":
            strategy = FedRotLoRA(other)
            _, expected = strategy.aggregate(strategy.init(before), before, updates)
            same = all(torch.equal(tensor, expected.tensors[name]) for name, tensor in result.tensors.items())
            assert same == (other == align), (number, other)
    assert int(run.state["rounds"]) == 4


def test_what_is_no_lora_factor_is_averaged() -> None:
    """(1 * [4, 8] + 3 * [8, 0]) / 4."""
    tensors = {"l.lora_A.weight": torch.ones(1, 1), "l.lora_B.weight": torch.ones(1, 1)}
    vectors = ([0.0, 0.0], [4.0, 8.0], [8.0, 0.0])
    before, *sent = (
        Adapters({**tensors, "l.lora_magnitude_vector": torch.tensor(vector)}, {"l": Layer(1.0, False)})
        for vector in vectors
    )
    strategy = FedRotLoRA()
    updates = [ClientUpdate(client, adapters, 2 * client + 1) for client, adapters in enumerate(sent)]
    _, result = strategy.aggregate(strategy.init(before), before, updates)
    assert result.tensors["l.lora_magnitude_vector"].tolist() == [7.0, 2.0]


@pytest.mark.parametrize(
    ("options", "what"), [({"align": "C"}, "align"), ({"strength": 1.5}, "strength"), ({"strength": -0.5}, "strength")]
)
def test_impossible_options_are_refused(options: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=f"{what} must be"):
        FedRotLoRA(**options)
