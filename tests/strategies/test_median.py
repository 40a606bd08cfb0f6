"""The coordinate-wise median: by hand, and as Flower's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flower_rounds import assert_equal_rounds
from flwr.serverapp.strategy import FedMedian
from rounds import Round, by_hand, start

from strategies.median import Median


def test_each_entry_has_its_own_median_by_hand() -> None:
    """A: median of 1, 5, 2 is 2 and of 9, 0, 3 is 3; B: of 4, 4, 7 is 4. Examples do not count."""
    pairs = [([[1.0, 9.0]], [[4.0]]), ([[5.0, 0.0]], [[4.0]]), ([[2.0, 3.0]], [[7.0]])]
    result = by_hand(Median(), pairs, [100, 1, 1], alpha=3.0)
    assert [tensor.tolist() for tensor in result.tensors.values()] == [[[2.0, 3.0]], [[4.0]]]


def test_of_an_even_number_it_is_the_mean_of_the_two_in_the_middle() -> None:
    """A: 1, 2, 4, 90 gives 3; B: -50, 6, 7, 8 gives 6.5."""
    pairs = [([[90.0]], [[8.0]]), ([[1.0]], [[-50.0]]), ([[4.0]], [[6.0]]), ([[2.0]], [[7.0]])]
    result = by_hand(Median(), pairs, [1, 2, 3, 4], alpha=3.0)
    assert [tensor.item() for tensor in result.tensors.values()] == [3.0, 6.5]


@pytest.mark.parametrize("clients", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("seed", range(3))
def test_several_rounds_are_flowers(clients, seed) -> None:
    assert_equal_rounds(Median(), FedMedian(fraction_train=0.0), clients, seed)


def test_less_than_half_of_the_clients_move_no_entry_out_of_the_others_range() -> None:
    run = Round.begin(Median(), start())
    updates = run.train([2] * 5)
    low, high = (
        {n: pick([u.adapters.tensors[n] for u in updates[2:]]) for n in run.adapters.tensors}
        for pick in (lambda ts: torch.stack(ts).amin(0), lambda ts: torch.stack(ts).amax(0))
    )
    for number, factor in ((0, 1e6), (1, -1e6)):
        far = {n: t * factor for n, t in updates[number].adapters.tensors.items()}
        updates[number] = replace(updates[number], adapters=run.adapters.with_tensors(far))
    for name, tensor in run.aggregate(updates).tensors.items():
        assert bool((low[name] <= tensor).all()) and bool((tensor <= high[name]).all())
