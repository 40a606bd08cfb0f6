"""Versions never change, and what an optimiser remembers can be taken along."""

from __future__ import annotations

import math

import pytest
import torch

from fedsplit.settings.sections import TrainSettings
from fedsplit.trunk.trainable import TrainableAdapter, Unusable
from fedsplit.updates import Task

A, B = "l.lora_A.weight", "l.lora_B.weight"
START = {A: torch.ones(2, 3), B: torch.zeros(4, 2)}


def gradients(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in START.items()}


def test_a_step_publishes_a_version_and_leaves_the_older_ones() -> None:
    adapter = TrainableAdapter(START, TrainSettings(lr=0.1), learns=True)
    first = adapter.snapshot
    adapter.step(gradients(0))
    assert all(torch.equal(first[name], START[name]) for name in START)
    assert not any(torch.equal(adapter.snapshot[name], START[name]) for name in START)


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        (TrainSettings(lr=1e25), 1.0),
        (TrainSettings(lr=0.5, weight_decay=1e25), 1.0),
        (TrainSettings(lr=1.0, optimizer="sgd", momentum=0.9), 1.2e19),
    ],
    ids=["rate", "decay", "gradient"],
)
def test_a_step_that_is_not_made_leaves_neither_adapter_nor_moments_changed(
    settings: TrainSettings, size: float
) -> None:
    """The next step is that of an adapter which has never seen the one that was not made."""
    disturbed, calm = (TrainableAdapter(START, settings, learns=True) for _ in range(2))
    for adapter in (disturbed, calm):
        adapter.step({name: tensor * 1e-3 for name, tensor in gradients(0).items()}, rate=1e-30)
    whole = math.sqrt(sum(float((tensor**2).sum()) for tensor in gradients(1).values()))
    for _ in range(2):
        with pytest.raises(Unusable, match="would not be finite after the step"):
            for _ in range(3):  # a momentum grows
                disturbed.step({name: tensor * (size / whole) for name, tensor in gradients(1).items()})
                calm.step({name: tensor * (size / whole) for name, tensor in gradients(1).items()})
    assert disturbed.steps == calm.steps
    for name, tensor in calm.snapshot.items():
        assert torch.equal(disturbed.snapshot[name], tensor)
    expected = calm.moments()
    assert expected
    assert all(torch.equal(value, expected[name]) for name, value in disturbed.moments().items())


def test_a_transposed_gradient_is_not_scrambled() -> None:
    plain, transposed = (TrainableAdapter(START, TrainSettings(lr=0.1), learns=True) for _ in range(2))
    for seed in range(3):
        plain.step(gradients(seed))
        transposed.step({name: tensor.t().contiguous().t() for name, tensor in gradients(seed).items()})
    assert all(torch.equal(plain.snapshot[name], transposed.snapshot[name]) for name in START)


def test_a_factor_that_does_not_train_stays_and_takes_no_gradient() -> None:
    adapter = TrainableAdapter(START, TrainSettings(lr=0.1), True, Task(trains=frozenset("B")))
    assert {name for name, tensor in adapter.snapshot.items() if tensor.requires_grad} == {B}
    adapter.step({B: gradients(0)[B]})
    assert torch.equal(adapter.snapshot[A], START[A]) and not torch.equal(adapter.snapshot[B], START[B])
    idle = TrainableAdapter(START, TrainSettings(), learns=False)
    assert not any(tensor.requires_grad for tensor in idle.snapshot.values())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_another_life_goes_on_to_the_bit(optimizer: str) -> None:
    settings = TrainSettings(lr=0.1, optimizer=optimizer)
    straight, stopped = (TrainableAdapter(START, settings, learns=True) for _ in range(2))
    for seed in range(3):
        straight.step(gradients(seed))
        stopped.step(gradients(seed))
    again = TrainableAdapter(START, settings, learns=True)
    again.write(stopped.snapshot)
    again.restore(stopped.moments())
    assert bool(stopped.moments()) == (optimizer == "adamw")
    for seed in range(3, 6):
        straight.step(gradients(seed))
        again.step(gradients(seed))
    assert all(torch.equal(straight.snapshot[name], again.snapshot[name]) for name in START)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e20])
def test_a_step_that_would_leave_what_is_not_finite_is_not_made(value: float) -> None:
    adapter = TrainableAdapter({"x": torch.ones(3)}, TrainSettings(lr=0.1), learns=True)
    adapter.step({"x": torch.ones(3)})
    snapshot, moments = adapter.snapshot, adapter.moments()
    with pytest.raises(Unusable, match="the gradient of the trunk's adapter"):
        adapter.step({"x": torch.tensor([1.0, value, 1.0])})
    assert adapter.snapshot is snapshot
    assert all(torch.equal(moments[name], moment) for name, moment in adapter.moments().items())


def test_a_rate_that_would_make_the_adapter_infinite_is_named_and_the_adapter_stays() -> None:
    adapter = TrainableAdapter({"x": torch.ones(3)}, TrainSettings(lr=1e30), learns=True)
    with pytest.raises(Unusable, match=r"--train.lr is too large"):
        adapter.step({"x": torch.ones(3)})
    adapter._publish()
    assert torch.equal(adapter.snapshot["x"].detach(), torch.ones(3))
    assert all(torch.isfinite(moment).all() for moment in adapter.moments().values())
