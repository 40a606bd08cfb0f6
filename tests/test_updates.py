"""Updates, their weights and their averages."""

from __future__ import annotations

import pytest
import torch

from fedsplit.updates import Adapters, ClientUpdate, Layer, Task, average_adapters, mean_change, weighted


def update(client: int, value: float, **more) -> ClientUpdate:
    tensors = {"l.lora_A.weight": torch.full((1, 2), value), "l.lora_B.weight": torch.full((3, 1), 2 * value)}
    return ClientUpdate(client, Adapters(tensors, {"l": Layer(1.0, False)}), **more)


def test_who_counts_and_how_much() -> None:
    """Weights 1 and 3 of examples; a weight that is given wins; none of nothing."""
    ordered, shares = weighted([update(2, 1.0, examples=3), update(0, 1.0, examples=1), update(1, 1.0, examples=0)])
    assert [u.client for u in ordered] == [0, 2] and shares == [0.25, 0.75]
    assert weighted([update(0, 1.0, examples=1, weight=2.0), update(1, 1.0, examples=1, weight=6.0)])[1] == [0.25, 0.75]
    with pytest.raises(ValueError, match="no client trained"):
        weighted([update(0, 1.0, examples=0)])


def test_the_average_of_factors_and_of_products() -> None:
    """A: (1 * 1 + 3 * 5) / 4 = 4, B = 8; the mean product is (1 * 2 + 3 * 50) / 4 = 38, not 32."""
    updates, shares = weighted([update(0, 1.0, examples=1), update(1, 5.0, examples=3)])
    averaged = average_adapters(updates[0].adapters, updates, shares)
    assert set(averaged.tensors["l.lora_A.weight"].flatten().tolist()) == {4.0}
    assert set(averaged.tensors["l.lora_B.weight"].flatten().tolist()) == {8.0}
    change = mean_change(updates, shares, "l")
    assert set((change.up @ change.down).flatten().tolist()) == {38.0}


def test_factors_that_are_not_averaged_stay() -> None:
    """A stays 1, B is (1 * 2 + 3 * 10) / 4 = 8, and what is no factor is (1 * 1 + 3 * 5) / 4 = 4."""
    updates, shares = weighted([update(0, 1.0, examples=1), update(1, 5.0, examples=3)])
    other = "l.lora_magnitude_vector.weight"
    for one in updates:
        one.adapters.tensors[other] = torch.full((3,), float(one.adapters.tensors["l.lora_A.weight"][0, 0]))
    averaged = average_adapters(updates[0].adapters, updates, shares, frozenset("B")).tensors
    assert {name: set(t.flatten().tolist()) for name, t in averaged.items()} == {
        "l.lora_A.weight": {1.0},
        "l.lora_B.weight": {8.0},
        other: {4.0},
    }


def test_a_task_teaches_the_factors_that_it_names_and_all_that_is_no_factor() -> None:
    names = ("l.lora_A.weight", "l.lora_B.weight", "l.lora_magnitude_vector.weight")
    assert [Task(trains=frozenset("B")).teaches(name) for name in names] == [False, True, True]
    assert all(Task().teaches(name) for name in names)
