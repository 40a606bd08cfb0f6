"""Zero-padding by hand, and what has no rank."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rounds import Round, applied, start

from fedsplit.federation.strategy import load_strategy
from fedsplit.updates import Adapters, ClientUpdate, Layer
from strategies.mixed_ranks import average_others, padded_average, rank_of


def adapters(a: list[list[float]], b: list[list[float]], alpha: float = 2.0, rslora: bool = False) -> Adapters:
    layers = {"l": Layer(alpha, False, rslora)}
    return Adapters({"l.lora_A.weight": torch.tensor(a), "l.lora_B.weight": torch.tensor(b)}, layers)


def test_padding_keeps_what_a_client_adds_to_the_weights() -> None:
    """alpha 2: at rank 1 s is 2, at rank 2 it is 1, so B of the first doubles before the mean of (1, 3) / 4:

    A = [[1, 0], [0, 0]] / 4 + [[5, 0], [0, 4]] * 3 / 4; B = [[2, 0], [0, 0]] * 2 / 4 + [[4, 0], [0, 8]] * 3 / 4.
    """
    small = ClientUpdate(0, adapters([[1.0, 0.0]], [[2.0], [0.0]]), 1)
    large = ClientUpdate(1, adapters([[5.0, 0.0], [0.0, 4.0]], [[4.0, 0.0], [0.0, 8.0]]), 3)
    a, b = padded_average(large.adapters, [small, large], [0.25, 0.75])["l"]
    assert a.tolist() == [[4.0, 0.0], [0.0, 3.0]]
    assert b.tolist() == [[4.0, 0.0], [0.0, 6.0]]


def test_with_rslora_the_ratio_is_the_root() -> None:
    """alpha / sqrt(4) is half of alpha / sqrt(1)."""
    wide = adapters([[0.0]] * 4, [[0.0] * 4], rslora=True)
    small = ClientUpdate(0, adapters([[1.0]], [[3.0]], rslora=True), 1)
    assert padded_average(wide, [small], [1.0])["l"][1].tolist() == [[6.0, 0.0, 0.0, 0.0]]


def test_rows_that_nobody_held_stay_in_a_and_are_zero_in_b() -> None:
    """Zeros in both would get no gradient, ever."""
    before = adapters([[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]])
    update = ClientUpdate(0, adapters([[9.0, 9.0]], [[1.0], [1.0]]), 1)
    a, b = padded_average(before, [update], [1.0])["l"]
    assert a.tolist() == [[9.0, 9.0], [3.0, 4.0]]
    assert b.tolist() == [[2.0, 0.0], [2.0, 0.0]]


def test_the_largest_rank_counts() -> None:
    assert rank_of(start(rank=3)) == 3
    assert rank_of(Adapters({"l.lora_magnitude_vector": torch.ones(2)}, {})) == 1


@pytest.mark.parametrize("name", ["hetlora", "flexlora", "lora_fair"])
def test_what_is_no_lora_factor_is_averaged_by_shares_whatever_the_ranks(name: str) -> None:
    """(1 * [4, 8] + 3 * [8, 0]) / 4 = [7, 2]."""
    magnitude = "linear.lora_magnitude_vector"

    def with_vector(some: Adapters, value: list[float]) -> Adapters:
        return some.with_tensors({**some.tensors, magnitude: torch.tensor(value)})

    run = Round.begin(load_strategy(name, {}, {}), start(rank=4))
    plain = run.train([2, 4], [1, 3])
    expected = applied(load_strategy(name, {}, {}).aggregate({}, run.adapters, plain)[1])
    run.adapters = with_vector(run.adapters, [0.0, 0.0])
    values = ([4.0, 8.0], [8.0, 0.0])
    updates = [replace(u, adapters=with_vector(u.adapters, v)) for u, v in zip(plain, values, strict=True)]
    result = run.aggregate(updates)
    assert result.tensors[magnitude].tolist() == [7.0, 2.0]
    assert all(torch.equal(tensor, expected[layer]) for layer, tensor in applied(result).items())


def test_averaging_the_others_leaves_the_factors() -> None:
    before, update = adapters([[1.0]], [[2.0]]), ClientUpdate(0, adapters([[3.0]], [[4.0]]), 1)
    assert average_others(before, [update], [1.0]).tensors == before.tensors
