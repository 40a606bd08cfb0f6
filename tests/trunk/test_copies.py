"""Clients' copies of the trunk's adapter: what they start from, and what stays of them; by hand, with plain SGD."""

from __future__ import annotations

import torch
from test_registry import START, A, B, learn, registry, value

from fedsplit.trunk.copies import Start
from fedsplit.updates import Task
from fedsplit.wire.packets import Packet, StepKey


def test_copies_are_their_clients_own_and_obey_its_task() -> None:
    those = registry("copies")
    moved = {name: torch.ones(1, 1) for name in START.tensors}
    task = Task(trains=frozenset("B"), control={B: torch.full((1, 1), 10.0)})
    those.assign({0: Start(moved, task, {B: torch.full((1, 1), 3.0)})})
    adapter = those.of(0, begins=True)
    packet = [Packet(StepKey(1, 0, 0))]
    those.learn(adapter, adapter.snapshot, False, packet, {B: torch.ones(1, 1)})
    learn(those, [5], 2.0)
    copies = those.copies()
    assert (value(copies[0].adapters, A), value(copies[0].adapters, B)) == (1.0, 1.0 - (1.0 - 3.0 + 10.0))
    assert float(copies[0].control[B]) == 1.0 - 3.0 and list(copies[0].control) == [B]
    assert value(copies[5].adapters) == -2.0 and copies[5].control == {}
    those.end_round([5])
    assert list(those.copies()) == [5] and value(those.read()) == 0.0


def test_a_written_adapter_ends_copies_but_for_those_that_are_somebodys_own() -> None:
    those = registry("copies")
    learn(those, [0], 1.0)
    own = {name: torch.full((1, 1), 7.0) for name in START.tensors}
    those.write({name: torch.full((1, 1), 5.0) for name in START.tensors}, {1: own})
    assert value(those.read()) == 5.0
    evaluated = {client: float(those.of(client, begins=False).snapshot[A].detach()) for client in (0, 1)}
    assert evaluated == {0: 5.0, 1: 7.0}


def test_copies_go_on_from_the_last_round_that_counted() -> None:
    """Momentum by hand: what a round left is there in the next, unless that one starts afresh or has another rank."""
    those = registry("copies", momentum=0.5, optimizer_state="keep")
    start = Start(START.tensors)

    def round_of(gradient: float, begin: Start = start, finished: tuple[int, ...] = (0,)) -> float:
        those.assign({0: begin})
        adapter = those.of(0, begins=True)
        packet = [Packet(StepKey(1, 0, 0))]
        gradients = {name: torch.full(tensor.shape, gradient) for name, tensor in begin.tensors.items()}
        those.learn(adapter, adapter.snapshot, False, packet, gradients)
        found = float(adapter.snapshot[A].detach()[0, 0])
        those.end_round(finished)
        those.write(START.tensors)
        return found

    assert round_of(4.0) == -4.0
    assert round_of(1.0, finished=()) == -3.0  # did not count
    assert round_of(1.0) == -3.0
    saved = those.moments()
    assert saved.keys() == {f"0/{name}:momentum_buffer" for name in START.tensors}
    assert round_of(0.0) == -1.5
    assert round_of(1.0, Start(START.tensors, afresh=True)) == -1.0
    wider = {A: torch.zeros(2, 1), B: torch.zeros(1, 2)}
    assert round_of(2.0, Start(wider)) == -2.0
    those.restore(START.tensors, saved)
    assert round_of(0.0) == -1.5
    assert registry("copies", momentum=0.5).moments() == {}
