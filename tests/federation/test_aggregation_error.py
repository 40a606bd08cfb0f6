"""The aggregation error against dense matrices, and by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.federation.aggregation_error import measure
from fedsplit.lowrank import LowRank
from fedsplit.updates import Adapters, ClientUpdate, Layer


def adapters(seed: int, rank: int) -> Adapters:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"l.lora_A.weight": (rank, 5), "l.lora_B.weight": (4, rank), "m.lora_A.weight": (rank, 3)}
    shapes["m.lora_B.weight"] = (6, rank)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return Adapters(tensors, {"l": Layer(3.0, False), "m": Layer(3.0, True)})


def dense(whole: Adapters, layer: str) -> torch.Tensor:
    a, b = (whole.tensors[f"{layer}.lora_{f}.weight"].double() for f in "AB")
    folded = whole.folded.get(layer)
    return 3.0 / a.shape[0] * b @ a + (folded.up.double() @ folded.down.double() if folded else 0)


@given(st.integers(0, 10**6), st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9)), min_size=1, max_size=4))
def test_it_is_the_relative_distance_of_dense_matrices(seed: int, clients: list[tuple[int, int]]) -> None:
    updates = [ClientUpdate(n, adapters(seed + n, rank), weight) for n, (rank, weight) in enumerate(clients)]
    start = adapters(seed + 50, 3)
    change = LowRank(torch.randn(4, 2, generator=torch.Generator().manual_seed(seed)), torch.ones(2, 5))
    result = Adapters(start.tensors, start.layers, {"l": change})
    whole = sum(weight for _, weight in clients)
    distances, sizes = {}, {}
    for layer in ("l", "m"):
        ideal = sum(dense(u.adapters, layer) * u.examples / whole for u in updates)
        distances[layer], sizes[layer] = float((dense(result, layer) - ideal).norm()), float(ideal.norm())
    found = measure(updates, result)
    assert found.layers == pytest.approx({layer: distances[layer] / sizes[layer] for layer in distances})
    expected = (sum(d**2 for d in distances.values()) / sum(s**2 for s in sizes.values())) ** 0.5
    assert found.overall == pytest.approx(expected)
    assert found.residual_rank == {"l": 2}


def test_what_averaging_of_factors_leaves_out() -> None:
    """B A of two clients: 1 * 1 and 3 * 5, mean 8; of the mean factors 2 * 3 = 6: a quarter is missing."""

    def scalar(a: float, b: float) -> Adapters:
        tensors = {"l.lora_A.weight": torch.tensor([[a]]), "l.lora_B.weight": torch.tensor([[b]])}
        return Adapters(tensors, {"l": Layer(2.0, False)})

    updates = [ClientUpdate(0, scalar(1, 1), 1), ClientUpdate(1, scalar(5, 3), 1)]
    assert measure(updates, scalar(3, 2)).overall == pytest.approx(0.25)


def test_nothing_trained_or_nothing_known_has_no_error() -> None:
    start = adapters(0, 2)
    zero = start.with_tensors({n: torch.zeros_like(t) for n, t in start.tensors.items()})
    assert measure([ClientUpdate(0, zero, 1)], zero).overall is None
    alone = start.only(frozenset("A"))
    assert measure([ClientUpdate(0, alone, 1)], start).overall is None
