"""When a gradient makes a step, and whose adapter it changes; by hand, with plain SGD."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from fedsplit.config import TrainSettings
from fedsplit.learners import Learners, Start
from fedsplit.packets import Packet, StepKey
from fedsplit.schedules import SCHEDULES
from fedsplit.updates import Adapters, Layer, Task

A, B = "l.lora_A.weight", "l.lora_B.weight"
START = Adapters({A: torch.zeros(1, 1), B: torch.zeros(1, 1)}, {"l": Layer(1.0, False)})


def learners(schedule: str) -> Learners:
    return Learners(START, SCHEDULES[schedule], TrainSettings(optimizer="sgd", lr=1.0), Counter())


def learn(those: Learners, clients: list[int], value: float, step: int = 0, micro: int = 0, **more) -> None:
    """A gradient of that value in both factors; SGD with a rate of 1 takes it off."""
    learner = those.of(clients[0], begins=True)
    packets = [Packet(StepKey(1, c, step, micro=micro), micros=more.get("micros", 1)) for c in clients]
    gradients = {name: torch.full((1, 1), value) for name in START.tensors}
    those.learn(learner, more.get("version", learner.version), more.get("spent", False), packets, gradients)


def value(adapters: Adapters, name: str = A) -> float:
    return float(adapters.tensors[name])


def test_shared_steps_at_once_or_when_all_micro_batches_are_there() -> None:
    those = learners("shared")
    learn(those, [0], 1.0)
    assert value(those.read()) == -1.0
    learn(those, [1], 2.0, step=1, micro=0, micros=2)
    assert value(those.read()) == -1.0
    learn(those, [0], 4.0, step=1)
    learn(those, [1], 8.0, step=1, micro=1, micros=2)
    assert value(those.read()) == -1.0 - 4.0 - 10.0
    assert those._counts == {"steps": 3}


def test_a_step_that_was_given_up_does_not_join_the_next() -> None:
    those = learners("shared")
    learn(those, [0], 1.0, step=0, micro=0, micros=2)
    learn(those, [0], 2.0, step=1, micro=0, micros=2)
    learn(those, [0], 4.0, step=1, micro=1, micros=2)
    assert value(those.read()) == -6.0
    learn(those, [0], 1.0, step=2, micro=0, micros=2)
    those.leave(0)
    learn(those, [0], 8.0, step=2, micro=1, micros=2)
    assert value(those.read()) == -6.0


def test_batched_takes_the_mean_once() -> None:
    those = learners("batched")
    learn(those, [0, 1, 2, 3], 8.0)
    learn(those, [1], 5.0, spent=True)
    assert value(those.read()) == -2.0 and those._counts == {"steps": 1, "late": 1}


def test_accumulate_sums_until_the_window_closes_and_knows_old_versions() -> None:
    those = learners("accumulate")
    old = those.shared.version
    learn(those, [0], 1.0)
    learn(those, [1], 2.0)
    learn(those, [0], 4.0, step=1)
    assert value(those.read()) == 0.0
    assert those.close_window([0]) and value(those.read()) == -5.0
    assert not those.close_window()
    learn(those, [1], 7.0, version=old)
    assert not those.close_window() and those._counts == {"steps": 1, "late": 1}


def test_copies_are_their_clients_own_and_obey_its_task() -> None:
    those = learners("copies")
    moved = {name: torch.ones(1, 1) for name in START.tensors}
    task = Task(trains=frozenset("B"), control={B: torch.full((1, 1), 10.0)})
    those.assign({0: Start(moved, task, {B: torch.full((1, 1), 3.0)})})
    learner = those.of(0, begins=True)
    packet = [Packet(StepKey(1, 0, 0))]
    those.learn(learner, learner.version, False, packet, {B: torch.ones(1, 1)})
    learn(those, [5], 2.0)
    copies = those.copies()
    assert (value(copies[0].adapters, A), value(copies[0].adapters, B)) == (1.0, 1.0 - (1.0 - 3.0 + 10.0))
    assert float(copies[0].control[B]) == 1.0 - 3.0 and list(copies[0].control) == [B]
    assert value(copies[5].adapters) == -2.0 and copies[5].control == {}
    those.end_round([5])
    assert list(those.copies()) == [5] and value(those.read()) == 0.0


def test_a_written_adapter_ends_copies_but_for_those_that_are_somebodys_own() -> None:
    those = learners("copies")
    learn(those, [0], 1.0)
    own = {name: torch.full((1, 1), 7.0) for name in START.tensors}
    those.write({name: torch.full((1, 1), 5.0) for name in START.tensors}, {1: own})
    assert value(those.read()) == 5.0
    evaluated = {client: float(those.of(client, begins=False).version[A].detach()) for client in (0, 1)}
    assert evaluated == {0: 5.0, 1: 7.0}


@pytest.mark.parametrize("schedule", ["frozen", "forward-only"])
def test_what_does_not_learn_takes_no_gradient(schedule: str) -> None:
    assert not any(tensor.requires_grad for tensor in learners(schedule).shared.version.values())
