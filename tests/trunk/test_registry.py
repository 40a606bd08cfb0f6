"""When a gradient makes a step, and whose adapter it changes; by hand, with plain SGD."""

from __future__ import annotations

import pytest
import torch

from fedsplit.optimization.bounds import LARGEST_SHARE
from fedsplit.settings.sections import TrainSettings
from fedsplit.trunk.gradients import UnclippedGradient
from fedsplit.trunk.registry import AdapterRegistry
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.trunk.status import RoundCounts
from fedsplit.trunk.trainable import Unusable
from fedsplit.updates import Adapters, Layer
from fedsplit.wire.packets import Packet, StepKey

A, B = "l.lora_A.weight", "l.lora_B.weight"
START = Adapters({A: torch.zeros(1, 1), B: torch.zeros(1, 1)}, {"l": Layer(1.0, False)})


def registry(schedule: str, **settings) -> AdapterRegistry:
    return AdapterRegistry(
        START, SCHEDULES[schedule], TrainSettings(optimizer="sgd", lr=1.0, **settings), RoundCounts()
    )


def learn(
    those: AdapterRegistry, clients: list[int], value: float, step: int = 0, micro: int = 0, **more
) -> UnclippedGradient | None:
    """A gradient of that value in both factors; SGD with a rate of 1 takes it off."""
    adapter = those.of(clients[0], begins=True)
    parts = {"micros": more.get("micros", 1), "batches": more.get("batches", 1)}
    rates = more.get("rates", [1.0] * len(clients))
    packets = [
        Packet(StepKey(1, c, step, micro=micro, batch=more.get("batch", 0)), rate=rate, **parts)
        for c, rate in zip(clients, rates, strict=True)
    ]
    gradients = {name: torch.full((1, 1), value) for name in START.tensors}
    return those.learn(adapter, more.get("snapshot", adapter.snapshot), more.get("spent", False), packets, gradients)


def value(adapters: Adapters, name: str = A) -> float:
    return float(adapters.tensors[name])


def test_shared_steps_at_once_or_when_all_micro_batches_are_there() -> None:
    those = registry("shared")
    learn(those, [0], 1.0)
    assert value(those.read()) == -1.0
    learn(those, [1], 2.0, step=1, micro=0, micros=2)
    assert value(those.read()) == -1.0
    learn(those, [0], 4.0, step=1)
    learn(those, [1], 8.0, step=1, micro=1, micros=2)
    assert value(those.read()) == -1.0 - 4.0 - 10.0
    assert those._counts.document() == {"steps": 3}


def test_a_step_that_was_given_up_does_not_join_the_next() -> None:
    those = registry("shared")
    learn(those, [0], 1.0, step=0, micro=0, micros=2)
    learn(those, [0], 2.0, step=1, micro=0, micros=2)
    learn(those, [0], 4.0, step=1, micro=1, micros=2)
    assert value(those.read()) == -6.0
    learn(those, [0], 1.0, step=2, micro=0, micros=2)
    those.leave(0)
    learn(those, [0], 8.0, step=2, micro=1, micros=2)
    assert value(those.read()) == -6.0


def test_batched_takes_the_mean_once() -> None:
    those = registry("batched")
    learn(those, [0, 1, 2, 3], 8.0)
    learn(those, [1], 5.0, spent=True)
    assert value(those.read()) == -2.0 and those._counts.document() == {"steps": 1, "late": 1}


def test_accumulate_sums_until_the_window_closes_and_knows_old_versions() -> None:
    those = registry("accumulate")
    old = those.shared.snapshot
    learn(those, [0], 1.0)
    learn(those, [1], 2.0)
    learn(those, [0], 4.0, step=1)
    assert value(those.read()) == 0.0
    assert those.close_window([0]) and value(those.read()) == -5.0
    assert not those.close_window()
    learn(those, [1], 7.0, snapshot=old)
    assert not those.close_window() and those._counts.document() == {"steps": 1, "late": 1}


@pytest.mark.parametrize("schedule", ["frozen", "forward-only"])
def test_what_does_not_learn_takes_no_gradient(schedule: str) -> None:
    assert not any(tensor.requires_grad for tensor in registry(schedule).shared.snapshot.values())


def test_a_step_of_several_batches_waits_for_the_last() -> None:
    those = registry("shared")
    for batch in range(2):
        for micro in range(2):
            assert value(those.read()) == 0.0
            learn(those, [0], 1.0, micro=micro, micros=2, batch=batch, batches=2)
    assert value(those.read()) == -4.0 and those._counts.document() == {"steps": 1}


def test_a_gradient_counts_at_the_rate_of_its_own_step() -> None:
    """Under `shared` each at its own, whoever came between; where one step is of several, at their mean rate."""
    those = registry("shared")
    learn(those, [0], 8.0, rates=[0.5])
    learn(those, [1], 8.0, rates=[0.25])
    assert value(those.read()) == -4.0 - 2.0
    those = registry("batched")
    learn(those, [0, 1], 8.0, rates=[0.5, 0.25])
    assert value(those.read()) == -4.0 * 0.375
    those = registry("accumulate")
    learn(those, [0], 8.0, rates=[1.0])
    learn(those, [0], 8.0, step=1, micro=0, micros=2, rates=[0.5])
    learn(those, [0], 8.0, step=1, micro=1, micros=2, rates=[0.5])
    learn(those, [1], 8.0, rates=[0.0])
    assert those.close_window() and value(those.read()) == -32.0 * 0.5


def test_a_gradient_that_is_to_be_clipped_waits_for_its_coefficient() -> None:
    those = registry("shared", clip=1.0)
    assert learn(those, [0], 3.0, micro=0, micros=2) is None
    unclipped = learn(those, [0], 1.0, micro=1, micros=2, rates=[0.5])
    assert unclipped is not None and unclipped.squared == 2 * 4.0**2
    learn(those, [1], 5.0)
    assert value(those.read()) == 0.0
    those.release(unclipped, 0.25)
    assert value(those.read()) == -4.0 * 0.25 * 0.5 and those._counts.document() == {"steps": 1}


def test_a_step_that_its_client_left_does_not_join_another() -> None:
    those = registry("shared", clip=1.0)
    learn(those, [0], 3.0, micro=0, micros=2)
    those.leave(0)
    assert learn(those, [0], 1.0, micro=1, micros=2) is None


def test_accumulate_sums_what_has_been_clipped_and_knows_old_versions() -> None:
    those = registry("accumulate", clip=1.0)
    first, second = learn(those, [0], 2.0), learn(those, [1], 4.0)
    learn(those, [2], 8.0, batch=0, batches=2)
    those.release(first, 0.5)
    assert those.close_window() and value(those.read()) == -1.0
    mixed = learn(those, [2], 8.0, batch=1, batches=2)
    for late in (second, mixed):
        those.release(late, 1.0)
    assert not those.close_window() and those._counts.document() == {"steps": 1, "late": 2}


def test_a_sum_stays_small_enough_to_be_added_to_those_of_others() -> None:
    """One client's share of a barrier is bounded as a whole; the others' step is made without what is too much."""
    those = registry("accumulate")
    learn(those, [0], 1.0)
    learn(those, [1], LARGEST_SHARE / 2)
    with pytest.raises(Unusable, match=r"a norm above 1e\+06, too large to be summed"):
        learn(those, [1], LARGEST_SHARE / 2, step=1)
    assert those.close_window([0]) and value(those.read()) == -1.0


def test_a_barrier_after_which_nothing_would_be_finite_makes_no_step() -> None:
    those = AdapterRegistry(START, SCHEDULES["accumulate"], TrainSettings(optimizer="sgd", lr=1e30), RoundCounts())
    learn(those, [0], 1.0)
    assert not those.close_window() and value(those.read()) == 0.0 and those._counts.document() == {"unusable": 1}
