"""Adapters: factors, ranks, changes, and the checks of tensors that replace them."""

from __future__ import annotations

import pytest
import torch

from fedsplit.factors import Adapters, Layer, RefusedUpdate, factor_of, fresh_factor
from fedsplit.lowrank import LowRank


@pytest.fixture
def adapters() -> Adapters:
    tensors = {"l.lora_A.weight": torch.ones(2, 3), "l.lora_B.weight": torch.zeros(4, 2)}
    return Adapters(tensors, {"l": Layer(alpha=4.0, transposed=False)})


def test_bytes_are_those_of_all_factors(adapters: Adapters) -> None:
    assert adapters.nbytes == (6 + 8) * 4


def test_factors_of_a_layer(adapters: Adapters) -> None:
    a, b = adapters.factors("l")
    assert (a.shape, b.shape) == ((2, 3), (4, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("l.lora_A.weight"), "ann sent other layers"),
        (lambda t: t.update(x=torch.ones(1)), "ann sent other layers than it was given: x"),
        (lambda t: t.update({"l.lora_A.weight": torch.ones(1, 3)}), r"ann sent l.lora_A.weight with shape \(1, 3\)"),
        (lambda t: t.update({"l.lora_B.weight": torch.full((4, 2), torch.nan)}), "ann sent NaN .* l.lora_B"),
        (lambda t: t.update({"l.lora_B.weight": torch.full((4, 2), torch.inf)}), "ann sent NaN or infinite"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(adapters: Adapters, change, message: str) -> None:
    tensors = dict(adapters.tensors)
    adapters.check_fits(tensors, "ann")
    change(tensors)
    with pytest.raises(RefusedUpdate, match=message):
        adapters.check_fits(tensors, "ann")


@pytest.mark.parametrize(("rslora", "expected"), [(False, 8 / 4), (True, 8 / 2)])
def test_scaling_goes_with_the_rank(rslora: bool, expected: float) -> None:
    assert Layer(alpha=8.0, transposed=False, rslora=rslora).scaling(4) == expected


def test_factors_are_known_by_name() -> None:
    names = ("x.lora_A.weight", "x.lora_B.weight", "x.lora_magnitude_vector.weight", "lora_A.x")
    assert [factor_of(name) for name in names] == ["A", "B", None, None]


@pytest.mark.parametrize("rslora", [False, True])
def test_another_rank_adds_the_same_to_the_weights(rslora: bool) -> None:
    tensors = {"l.lora_A.weight": torch.randn(2, 3), "l.lora_B.weight": torch.randn(4, 2)}
    adapters = Adapters(tensors, {"l": Layer(4.0, False, rslora)})
    before = adapters.change("l")
    grown = adapters.with_rank(5)
    assert [t.shape for t in grown.factors("l")] == [(5, 3), (4, 5)]
    assert torch.allclose(grown.change("l").up @ grown.change("l").down, before.up @ before.down, atol=1e-6)
    cut = adapters.with_rank(1).change("l")
    assert torch.allclose(cut.up @ cut.down, before.up[:, :1] @ before.down[:1], atol=1e-6)
    assert adapters.with_rank(2).tensors.keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in adapters.with_rank(2).tensors.items())


def test_only_some_factors_leave_what_is_none(adapters: Adapters) -> None:
    more = adapters.with_tensors({**adapters.tensors, "l.lora_magnitude_vector.weight": torch.ones(4)})
    assert set(more.only(frozenset("B")).tensors) == {"l.lora_B.weight", "l.lora_magnitude_vector.weight"}
    assert more.only(frozenset("B")).complete == [] and more.complete == ["l"]


def test_a_fresh_factor_depends_on_seed_and_name_alone() -> None:
    torch.manual_seed(1)
    one = fresh_factor("l.lora_A.weight", (2, 3), 5)
    torch.manual_seed(2)
    assert torch.equal(one, fresh_factor("l.lora_A.weight", (2, 3), 5))
    assert not torch.equal(one, fresh_factor("l.lora_A.weight", (2, 3), 6))
    assert not torch.equal(one, fresh_factor("m.lora_A.weight", (2, 3), 5))
    assert 0 < float(one.abs().max()) <= 3**-0.5  # kaiming_uniform with a = sqrt(5): +-1 / sqrt(in)


@pytest.mark.parametrize(
    ("layer", "up", "down", "message"),
    [
        ("x", (4, 1), (1, 3), "ann wants to fold something into x, which is no adapted layer"),
        ("l", (3, 1), (1, 3), r"ann wants to fold a matrix of shape \(3, 3\) into l"),
        ("l", (4, 2), (1, 3), "ann wants to fold a matrix of shape"),
    ],
)
def test_what_cannot_be_folded_is_refused(adapters: Adapters, layer: str, up, down, message: str) -> None:
    def folding(change: LowRank, into: str = "l") -> Adapters:
        return Adapters(adapters.tensors, adapters.layers, {into: change})

    folding(LowRank(torch.ones(4, 1), torch.ones(1, 3))).check_folded("ann")
    with pytest.raises(RefusedUpdate, match=message):
        folding(LowRank(torch.ones(up), torch.ones(down)), layer).check_folded("ann")
    with pytest.raises(RefusedUpdate, match="NaN"):
        folding(LowRank(torch.full((4, 1), torch.nan), torch.ones(1, 3))).check_folded("ann")
