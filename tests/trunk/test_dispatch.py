"""Who is served when: gathering, deadlines, barriers, turns; and that nobody waits for ever."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_server import make_server

from fedsplit.settings.sections import TrunkSettings
from fedsplit.trunk.dispatch import Dispatcher
from fedsplit.trunk.requests import Answer
from fedsplit.trunk.server import Work
from fedsplit.trunk.workers import BACKWARD, FORWARD, outcome
from fedsplit.wire.codecs import make_codec
from fedsplit.wire.encoded import Encoded, MalformedPacket
from fedsplit.wire.packets import Packet, StepKey, check_form
from fedsplit.wire.steps import SpoiledStep, StaleStep

RAW = make_codec("raw")


class Recorder:
    """Stands for a trunk: remembers what it was asked to compute, and in which company."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[int]]] = []
        self.batches: dict[StepKey, frozenset[StepKey]] = {}
        self.done: dict[StepKey, Packet] = {}
        self.room = True
        self.spoiled: set[int] = set()
        self.broken: set[int] = set()
        self.clips = False
        self.steps = self.adapters = self

    def attend(self, is_attended: bool) -> None:
        pass

    def held(self, key: StepKey) -> object:
        if key not in self.batches:
            raise StaleStep(str(key))
        return self.batches[key]

    def next_expiry(self) -> float | None:
        return None

    def expire(self) -> None:
        pass

    def companions(self, key: StepKey) -> set[int]:
        return {other.client for other in self.batches.get(key, ()) if other in self.batches}

    def is_repeat(self, packet: Packet) -> bool:
        return not packet.clips and packet.key in (self.done if "gradient" in packet.tensors else self.batches)

    def ask(self, packet: Packet) -> Packet:
        return Packet(packet.key, wait=0.0 if self.room else 0.1)

    def begin_forward(self, packets: Sequence[Packet]) -> Work:
        return Work(lambda: None, lambda _: self._forward(packets))

    def begin_backward(self, packets: Sequence[Packet]) -> Work:
        if any(packet.key.client in self.spoiled for packet in packets):
            raise SpoiledStep("spoiled")
        return Work(lambda: None, lambda _: self._backward(packets))

    def _forward(self, packets: Sequence[Packet]) -> list[Packet]:
        if not packets[0].training:
            self.calls.append(("evaluate", [packet.key.client for packet in packets]))
            return [Packet(packet.key) for packet in packets]
        self.calls.append(("forward", [packet.key.client for packet in packets]))
        if self.broken & {packet.key.client for packet in packets}:
            raise MemoryError("no memory is left")
        if not self.room:
            return [Packet(packet.key, wait=0.1) for packet in packets]
        if self.is_repeat(packets[0]):
            return [Packet(packets[0].key)]
        batch = frozenset(packet.key for packet in packets)
        self.batches |= dict.fromkeys(batch, batch)
        return [Packet(packet.key) for packet in packets]

    def _backward(self, packets: Sequence[Packet]) -> list[Packet]:
        what = "scale" if packets[0].clips else "backward"
        self.calls.append((what, [packet.key.client for packet in packets]))
        for packet in packets:
            self.batches.pop(packet.key, None)
            self.done[packet.key] = Packet(packet.key)
        return [self.done[packet.key] for packet in packets]

    def close_window(self) -> None:
        self.calls.append(("close", []))

    def leave(self, client: int) -> None:
        self.batches = {key: batch for key, batch in self.batches.items() if key.client != client}

    def end_round(self, finished: Sequence[int]) -> dict[str, int]:
        return {}


class Stage:
    """A dispatcher, its recorder, and a clock."""

    def __init__(self, **settings: Any) -> None:
        self.trunk, self.now = Recorder(), 0.0
        self.dispatcher = Dispatcher(self.trunk, TrunkSettings(**settings), lambda: self.now)  # type: ignore[arg-type]
        self.answers: dict[tuple[str, int, int], Answer] = {}

    def ask(self, kind: str, client: int, step: int = 0, learns: bool = True, is_adapted: bool = True) -> None:
        name = {"backward": "gradient", "scale": "coefficient"}.get(kind, "hidden")
        tensors = {} if kind == "ask" else {name: RAW.encode(torch.zeros(1))}
        key = StepKey(1, client, step)
        packet = Packet(key, tensors, training=kind != "evaluate", learns=learns, is_adapted=is_adapted)
        self.dispatcher.submit(packet, lambda answer: self.answers.__setitem__((kind, client, step), answer))

    def serve(self) -> list[tuple[str, list[int]]]:
        """Serves all that can be served, and returns what was computed."""
        begin = len(self.trunk.calls)
        while self.dispatcher.advance():
            pass
        return self.trunk.calls[begin:]


def test_shared_serves_who_is_there_and_gradients_first() -> None:
    stage = Stage(schedule="shared")
    stage.ask("forward", 1)
    assert stage.serve() == [("forward", [1])]
    stage.ask("forward", 2)
    stage.ask("evaluate", 3)
    stage.ask("backward", 1)
    assert stage.serve() == [("evaluate", [3]), ("backward", [1]), ("forward", [2])]
    assert stage.dispatcher.wakes_at() is None


@pytest.mark.parametrize("schedule", ["shared", "batched"])
def test_whoever_asks_for_what_breaks_is_told_and_the_others_are_served(schedule: str) -> None:
    """What is no refusal, such as memory that ran out, must not leave anybody without an answer."""
    stage = Stage(schedule=schedule)
    stage.trunk.broken = {1}
    stage.ask("forward", 1)
    stage.serve()
    assert isinstance(stage.answers["forward", 1, 0], MemoryError)
    stage.dispatcher.leave(1)
    stage.ask("forward", 2)
    assert stage.serve() == [("forward", [2])]
    assert isinstance(stage.answers["forward", 2, 0], Packet)


def test_batched_waits_for_all_that_are_active() -> None:
    stage = Stage(schedule="batched", deadline=5.0)
    stage.ask("forward", 1)
    assert stage.serve() == [("forward", [1])]
    stage.ask("forward", 0)
    assert stage.serve() == []
    stage.ask("backward", 1)
    assert stage.serve() == [("backward", [1])]
    stage.ask("forward", 1, step=1)
    assert stage.serve() == [("forward", [0, 1])]
    stage.ask("backward", 0)
    assert stage.serve() == []
    stage.ask("backward", 1, step=1)
    assert stage.serve() == [("backward", [0, 1])]


@pytest.mark.parametrize("client", [0, 1])
def test_of_what_comes_twice_a_batch_has_one_and_the_other_is_a_repeat(client: int) -> None:
    stage = Stage(schedule="batched")
    stage.dispatcher.begin([0, 1])
    for kind in ("forward", "backward"):
        for number in (client, client, 1 - client):
            stage.ask(kind, number)
        first, *rest = stage.serve()
        assert (first[0], sorted(first[1])) == (kind, [0, 1]) and rest == [(kind, [client])]
        assert all(isinstance(stage.answers[kind, number, 0], Packet) for number in (0, 1))


def test_of_a_client_a_batch_has_the_earliest_step() -> None:
    """A later step would end the earlier one while their batch begins."""
    stage = Stage(schedule="batched")
    stage.dispatcher.begin([0, 1])
    for client, step in ((1, 1), (1, 0), (0, 0)):
        stage.ask("forward", client, step)
    assert stage.serve() == [("forward", [0, 1])]
    assert set(stage.answers) == {("forward", 0, 0), ("forward", 1, 0)}


def test_hidden_states_of_two_types_are_of_two_batches() -> None:
    stage = Stage(schedule="batched")
    stage.dispatcher.begin([0, 1, 2])
    for client, kind in enumerate((torch.bfloat16, torch.float32, torch.bfloat16)):
        sent = Packet(StepKey(1, client, 0), {"hidden": RAW.encode(torch.zeros(1, dtype=kind))})
        stage.dispatcher.submit(sent, lambda answer: None)
    assert stage.serve() == [("forward", [0, 2])]
    stage.dispatcher.leave(0)
    stage.dispatcher.leave(2)
    assert stage.serve() == [("forward", [1])]


def test_a_coefficient_is_of_no_batch_and_waits_for_nobody() -> None:
    stage = Stage(schedule="batched")
    stage.dispatcher.begin([0, 1])
    for client in (0, 1):
        stage.ask("forward", client)
    stage.serve()
    stage.ask("scale", 0, step=9)
    assert stage.serve() == [("scale", [0])]
    stage.ask("scale", 0, step=8)
    for client in (0, 1):
        stage.ask("backward", client)
    assert stage.serve() == [("scale", [0]), ("backward", [0, 1])]


def test_what_comes_again_does_not_contribute_again() -> None:
    stage = Stage(schedule="accumulate", every=2)
    for client in (0, 1):
        for step in range(2 - client):
            for kind in ("forward", "backward"):
                stage.ask(kind, client, step)
                stage.serve()
    stage.ask("backward", 1)
    assert stage.serve() == [("backward", [1])]
    stage.ask("forward", 0, step=2)
    assert stage.serve() == []  # client 1 has done one step of two
    for kind in ("forward", "backward"):
        stage.ask(kind, 1, step=1)
        stage.serve()
    assert ("close", []) in stage.trunk.calls


def test_who_is_late_is_left_behind_and_may_come_back() -> None:
    stage = Stage(schedule="batched", deadline=5.0)
    for client in (0, 1):
        stage.ask("forward", client)
    assert stage.serve() == [("forward", [0, 1])]
    stage.ask("backward", 0)
    assert stage.serve() == []
    assert stage.dispatcher.wakes_at() == 5.0
    stage.now = 5.0
    assert stage.serve() == [("backward", [0])]
    stage.ask("forward", 0, step=1)
    assert stage.serve() == [("forward", [0])]  # nobody waits for client 1 any more
    stage.ask("backward", 1)
    assert stage.serve() == [("backward", [1])]
    stage.ask("forward", 1, step=1)
    assert stage.serve() == []
    stage.ask("backward", 0, step=1)
    stage.ask("forward", 0, step=2)
    assert stage.serve() == [("backward", [0]), ("forward", [0, 1])]


def test_nobody_waits_for_a_client_that_has_left_or_died() -> None:
    stage = Stage(schedule="batched")
    for client in (0, 1):
        stage.ask("forward", client)
    stage.serve()
    stage.ask("backward", 0)
    assert stage.serve() == []
    stage.dispatcher.leave(1)
    assert stage.serve() == [("backward", [0])]


def test_what_a_client_asked_before_it_left_is_refused() -> None:
    stage = Stage(schedule="batched")
    stage.ask("forward", 0)
    stage.serve()
    stage.ask("forward", 1)
    stage.dispatcher.leave(1)
    assert isinstance(stage.answers["forward", 1, 0], StaleStep)


def test_one_spoiled_gradient_is_refused_alone() -> None:
    stage = Stage(schedule="batched")
    for client in (0, 1):
        stage.ask("forward", client)
    stage.serve()
    stage.trunk.spoiled = {1}
    for client in (0, 1):
        stage.ask("backward", client)
    assert stage.serve() == [("backward", [0])]
    assert isinstance(stage.answers["backward", 0, 0], Packet)
    assert isinstance(stage.answers["backward", 1, 0], SpoiledStep)


def test_who_was_sent_away_comes_first_next_time() -> None:
    stage = Stage(schedule="batched")
    stage.trunk.room = False
    stage.ask("forward", 1)
    assert stage.serve() == [("forward", [1])]
    stage.trunk.room = True
    stage.ask("forward", 1)
    stage.ask("forward", 0)
    assert stage.serve() == [("forward", [1, 0])]


def test_who_waits_for_room_is_not_waited_for() -> None:
    """It might wait for what those who wait for it have."""
    stage = Stage(schedule="batched")
    stage.trunk.room = False
    stage.ask("ask", 0)
    stage.serve()
    stage.trunk.room = True
    stage.ask("forward", 1)
    assert stage.serve() == [("forward", [1])]
    stage.ask("ask", 0)
    stage.ask("backward", 1)
    stage.ask("forward", 1, step=1)
    assert stage.serve() == [("backward", [1])]
    stage.ask("forward", 0)
    assert stage.serve() == [("forward", [0, 1])]


def test_accumulate_holds_at_the_barrier_until_all_have_come() -> None:
    stage = Stage(schedule="accumulate", every=1, deadline=5.0)
    for client in (0, 1):
        stage.ask("forward", client)
    assert stage.serve() == [("forward", [0]), ("forward", [1])]
    stage.ask("backward", 0)
    stage.ask("forward", 0, step=1)
    assert stage.serve() == [("backward", [0])]
    stage.ask("backward", 1)
    assert stage.serve() == [("backward", [1]), ("close", []), ("forward", [0])]
    stage.ask("backward", 0, step=1)
    stage.ask("forward", 0, step=2)
    assert stage.serve() == [("backward", [0])]
    stage.now = 4.9
    assert stage.serve() == []
    stage.now = 5.0
    assert stage.serve() == [("close", []), ("forward", [0])]


def test_a_gradient_that_is_clipped_contributes_with_its_coefficient() -> None:
    stage = Stage(schedule="accumulate", every=1)
    stage.trunk.clips = True
    for client in (0, 1):
        stage.ask("forward", client)
        stage.ask("backward", client)
    stage.serve()
    stage.ask("scale", 0)
    stage.ask("forward", 0, step=1)
    assert stage.serve() == [("scale", [0])]
    stage.ask("scale", 1)
    assert stage.serve() == [("scale", [1]), ("close", []), ("forward", [0])]


@pytest.mark.parametrize("schedule", ["batched", "accumulate"])
def test_a_step_that_teaches_the_trunk_nothing_waits_for_nobody_and_counts_for_nothing(schedule: str) -> None:
    stage = Stage(schedule=schedule, every=1)
    stage.dispatcher.begin([0, 1])
    for kind in ("forward", "backward"):
        stage.ask(kind, 0)
        stage.ask(kind, 1)
        stage.serve()
    stage.ask("forward", 1, step=1)
    assert stage.serve() == []  # waits for client 0, be it for its batch or at the barrier
    for kind in ("forward", "backward"):
        stage.ask(kind, 0, step=1, learns=False)
        assert stage.serve() == [(kind, [0])]
    stage.ask("forward", 0, step=2)
    together = [("forward", [0, 1])] if schedule == "batched" else [("close", []), ("forward", [1]), ("forward", [0])]
    assert stage.serve() == together


def test_in_a_group_a_barrier_waits_until_each_client_has_come_or_left() -> None:
    """So that what a client asks for before it comes is computed with the snapshot before the barrier."""
    stage = Stage(schedule="accumulate", every=1)
    stage.dispatcher.begin([0, 1, 2])
    for client in (0, 1, 2):
        for kind in ("forward", "backward"):
            stage.ask(kind, client)
            assert stage.serve() == [(kind, [client])]
    stage.ask("forward", 1, step=1)
    assert stage.serve() == []
    stage.ask("evaluate", 0)
    assert stage.serve() == [("evaluate", [0])]
    stage.ask("forward", 0, step=1)
    assert stage.serve() == []
    stage.dispatcher.leave(2)
    assert stage.serve() == [("close", []), ("forward", [1]), ("forward", [0])]


def test_accumulate_over_the_round_holds_nobody() -> None:
    stage = Stage(schedule="accumulate", every=0)
    for step in range(3):
        for kind in ("forward", "backward"):
            stage.ask(kind, 0, step)
            assert stage.serve() == [(kind, [0])]


@pytest.mark.parametrize("order", list(permutations([("forward", 0), ("forward", 1), ("forward", 2)])))
def test_turns_are_the_same_whoever_comes_first(order: Sequence[tuple[str, int]]) -> None:
    stage = Stage(schedule="shared")
    stage.dispatcher.begin([2, 0, 1])
    for kind, client in order:
        stage.ask(kind, client)
        stage.serve()
    for _, client in reversed(order):
        stage.ask("backward", client)
        stage.serve()
    stage.dispatcher.leave(2)
    for client in (1, 0):
        stage.ask("forward", client, step=1)
        stage.serve()
    expected = [("forward", 2), ("forward", 0), ("forward", 1), ("backward", 2), ("backward", 0), ("backward", 1)]
    assert [(kind, clients[0]) for kind, clients in stage.trunk.calls] == [*expected, ("forward", 0), ("forward", 1)]


@pytest.mark.parametrize("first", ["evaluate", "forward"])
def test_forwards_through_the_base_weights_take_no_turn(first: str) -> None:
    """Else the order in which a client's two packets come would decide whose turn is next."""
    stage = Stage(schedule="shared")
    stage.dispatcher.begin([0, 1])
    stage.ask("evaluate", 1, is_adapted=False)
    assert stage.serve() == [("evaluate", [1])]  # it is the turn of 0
    for kind in (first, "forward" if first == "evaluate" else "evaluate"):
        stage.ask(kind, 0, is_adapted=kind == "forward")
        stage.serve()
    stage.ask("forward", 1)
    stage.serve()
    assert [call for call in stage.trunk.calls if call[0] == "forward"] == [("forward", [0]), ("forward", [1])]


def test_a_group_is_waited_for_however_late() -> None:
    stage = Stage(schedule="batched", deadline=5.0)
    stage.dispatcher.begin([0, 1])
    stage.ask("forward", 1)
    stage.now = 100.0
    assert stage.serve() == []
    assert stage.dispatcher.wakes_at() is None
    stage.ask("forward", 0)
    assert stage.serve() == [("forward", [0, 1])]


def has_form(packet: Any) -> bool:
    """Whether a value that is odd elsewhere has its place here, as a text has as the name of a run."""
    try:
        check_form(packet)
    except MalformedPacket:
        return False
    return True


ODD: list[Any] = [[], {}, "0", None, True, 0.5, -1, 2**80, math.nan, b"x", ("a",)]


@pytest.mark.parametrize("schedule", ["shared", "batched", "accumulate"])
@pytest.mark.parametrize("grouped", [True, False])
def test_fields_of_odd_types_are_refused_at_once(schedule: str, grouped: bool) -> None:
    """Under turns they would never be served, and elsewhere end the thread that decides."""
    stage = Stage(schedule=schedule)
    if grouped:
        stage.dispatcher.begin([0, 1])
    plain = Packet(StepKey(1, 0, 0), {"hidden": RAW.encode(torch.zeros(1))})
    odd: list[Any] = [replace(plain, key=replace(plain.key, **{f.name: v})) for f in fields(StepKey) for v in ODD]
    odd += [replace(plain, **{f.name: v}) for f in fields(Packet) for v in ODD]
    odd += [replace(plain, tensors={"hidden": v}) for v in ODD]
    hidden = plain.tensors["hidden"]
    odd += [replace(plain, tensors={"hidden": replace(hidden, **{f.name: v})}) for f in fields(Encoded) for v in ODD]
    odd = [packet for packet in [*odd, *ODD] if not has_form(packet)]
    assert len(odd) > 200
    answers: list[Answer] = []
    for packet in odd:
        stage.dispatcher.submit(packet, answers.append)
    assert len(answers) == len(odd) and all(isinstance(answer, SpoiledStep) for answer in answers)
    for client in (0, 1):
        stage.ask("forward", client)
    stage.serve()
    assert stage.answers["forward", 0, 0] and stage.answers["forward", 1, 0]


@pytest.mark.parametrize("schedule", ["shared", "batched"])
def test_who_is_in_no_group_is_refused_at_once_and_holds_up_nobody(schedule: str) -> None:
    stage = Stage(schedule=schedule)
    stage.dispatcher.begin([0, 1])
    for kind in ("forward", "backward"):
        stage.ask(kind, 99)
        assert isinstance(stage.answers.pop((kind, 99, 0)), StaleStep)
    stage.ask("forward", 0)
    stage.ask("forward", 1)
    assert {client for _, clients in stage.serve() for client in clients} == {0, 1}
    stage.dispatcher.leave(1)
    stage.ask("backward", 1)
    assert isinstance(stage.answers["backward", 1, 0], StaleStep)
    stage.dispatcher.end_round([0])
    stage.ask("forward", 99, step=1)
    assert stage.serve()[-1] == ("forward", [99])


@given(data=st.data(), schedule=st.sampled_from(["shared", "batched", "accumulate", "copies"]), every=st.integers(0, 2))
def test_everybody_is_served_in_the_end(data: st.DataObject, schedule: str, every: int) -> None:
    """Clients with different numbers of steps, in any interleaving: all get all their answers."""
    stage = Stage(schedule=schedule, every=every)
    plans = {}
    for client in range(3):
        steps = data.draw(st.integers(1, 3))
        plans[client] = [(kind, step) for step in range(steps) for kind in ("forward", "backward")]
    at = dict.fromkeys(plans, 0)
    asked: set[int] = set()
    for _ in range(200):
        if not at:
            break
        client = data.draw(st.sampled_from(sorted(at)))
        kind, step = plans[client][at[client]]
        if client not in asked:
            stage.ask(kind, client, step)
            asked.add(client)
        stage.serve()
        for other in list(asked):
            kind, step = plans[other][at[other]]
            if (kind, other, step) in stage.answers:
                asked.discard(other)
                at[other] += 1
                if at[other] == len(plans[other]):
                    del at[other]
                    stage.dispatcher.leave(other)
        if asked == set(at):
            stage.now += 100.0  # all wait: only time can help
            stage.serve()
    assert not at
    assert all(isinstance(answer, Packet) for answer in stage.answers.values())


class ByHand:
    """WorkerThreads in which something is through when a test says so."""

    def __init__(self) -> None:
        self.under_way: dict[str, list[tuple[Callable[[], Any], Callable[[Any], None]]]] = {FORWARD: [], BACKWARD: []}

    def start(self, worker: str, compute: Callable[[], Any], done: Callable[[Any], None]) -> None:
        self.under_way[worker].append((compute, done))

    def end(self, worker: str) -> None:
        compute, done = self.under_way[worker].pop(0)
        done(outcome(compute))

    @property
    def counts(self) -> tuple[int, int]:
        return len(self.under_way[FORWARD]), len(self.under_way[BACKWARD])


class Beside(Stage):
    """A stage with workers."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.workers = ByHand()
        chosen = TrunkSettings(**settings)
        self.dispatcher = Dispatcher(self.trunk, chosen, lambda: self.now, self.workers)  # type: ignore[arg-type]


def test_with_workers_one_forward_and_one_backward_are_under_way_at_once() -> None:
    stage = Beside(schedule="shared")
    for client in (1, 2, 3):
        stage.ask("forward", client)
    assert stage.serve() == [] and stage.workers.counts == (1, 0)
    assert stage.dispatcher.is_computing
    stage.workers.end(FORWARD)
    assert set(stage.answers) == {("forward", 1, 0)}
    stage.ask("backward", 1)
    stage.serve()
    assert stage.workers.counts == (1, 1)
    assert [stage.dispatcher.computes_for(client) for client in (1, 2, 3)] == [True, True, False]
    stage.workers.end(BACKWARD)
    assert not stage.dispatcher.computes_for(1)
    assert ("backward", 1, 0) in stage.answers and stage.workers.counts == (1, 0)
    stage.workers.end(FORWARD)
    assert stage.serve() == [] and stage.workers.counts == (1, 0)
    stage.workers.end(FORWARD)
    assert not stage.dispatcher.is_computing
    assert stage.trunk.calls == [("forward", [1]), ("backward", [1]), ("forward", [2]), ("forward", [3])]


def test_nothing_expires_while_it_is_being_differentiated() -> None:
    stage, expired = Beside(schedule="shared"), []
    stage.trunk.expire = lambda: expired.append(stage.now)  # type: ignore[method-assign]
    stage.trunk.next_expiry = lambda: 5.0  # type: ignore[method-assign]
    stage.ask("forward", 1)
    stage.serve()
    stage.workers.end(FORWARD)
    stage.ask("backward", 1)
    stage.serve()
    assert stage.dispatcher.wakes_at() is None
    seen = len(expired)
    stage.serve()
    assert len(expired) == seen
    stage.workers.end(BACKWARD)
    stage.serve()
    assert len(expired) == seen + 1
    assert stage.dispatcher.wakes_at() == 5.0


def test_a_barrier_is_passed_when_all_that_counts_before_it_has_come_back() -> None:
    stage = Beside(schedule="accumulate", every=1)
    for client in (1, 2):
        stage.ask("forward", client)
        stage.serve()
        stage.workers.end(FORWARD)
    stage.ask("backward", 1)
    stage.serve()
    stage.workers.end(BACKWARD)
    stage.ask("forward", 1, 1)
    stage.ask("backward", 2)
    stage.serve()
    assert stage.workers.counts == (0, 1)
    stage.now = 1e6  # a deadline that passes meanwhile changes nothing either
    assert stage.serve() == [] and stage.workers.counts == (0, 1)
    stage.workers.end(BACKWARD)
    assert stage.serve() == [("close", [])]
    assert stage.workers.counts == (1, 0)


def test_with_workers_who_spoils_it_for_all_is_told_alone() -> None:
    stage = Beside(schedule="batched")
    for client in (1, 2):
        stage.ask("forward", client)
    for name, kind in ((FORWARD, "forward"), (BACKWARD, "backward")):
        if kind == "backward":
            stage.trunk.spoiled = {2}
            for client in (1, 2):
                stage.ask("backward", client)
        stage.serve()
        while stage.workers.under_way[name]:
            stage.workers.end(name)
    assert isinstance(stage.answers["backward", 2, 0], SpoiledStep)
    assert isinstance(stage.answers["backward", 1, 0], Packet)
    assert not stage.dispatcher.is_computing


WIDTH = 32
"""Of the hidden states of `tiny_models`."""


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_with_workers_the_trunk_does_what_it_does_without(tiny_models: dict[str, Path], data: st.DataObject) -> None:
    """Whatever comes back when: as if each forward were made as it begins, and each backward as it comes back.

    Answers and adapter are the same to the bit. Clients leave when they have nothing more to send, one of them with a
    forward that is pending; the others' work may be under way then.
    """
    schedule = data.draw(st.sampled_from(["shared", "copies", "accumulate", "frozen"]))
    workers = ByHand()
    beside, alone = (make_server(tiny_models["gpt2"], schedule, dropout=0.3) for _ in range(2))
    dispatcher = Dispatcher(beside, TrunkSettings(schedule=schedule), workers=workers)
    clients = data.draw(st.integers(2, 4))
    tensors = torch.randn(3, clients, 2, 2, 3, WIDTH, generator=torch.Generator().manual_seed(0))
    answers: dict[tuple[str, StepKey], Answer] = {}
    events: list[tuple[str, Packet]] = []
    next_of = dict.fromkeys(range(clients), 0)
    last_of = {**dict.fromkeys(range(clients), 6), 0: 1}
    staying = set(range(clients))

    def send(client: int) -> None:
        step, kind = divmod(next_of[client], 2)
        if next_of[client] == last_of[client]:
            return
        name = ("hidden", "gradient")[kind]
        packet = Packet(StepKey(1, client, step), {name: RAW.encode(tensors[step, client, kind])})

        def done(answer: Answer) -> None:
            answers[name, packet.key] = answer
            if name == "gradient":
                events.append((name, packet))
            next_of[client] += 1
            send(client)

        dispatcher.submit(packet, done)

    begin_forward = beside.begin_forward

    def begin(packets: Sequence[Packet]) -> Work:
        events.append(("hidden", packets[0]))
        return begin_forward(packets)

    beside.begin_forward = begin  # type: ignore[method-assign]
    for client in range(clients):
        send(client)
    while dispatcher.advance() or dispatcher.is_computing:
        busy = [worker for worker, found in workers.under_way.items() if found]
        if busy and (len(busy) == 2 or not dispatcher.advance()):
            workers.end(data.draw(st.sampled_from(busy)))
        through = [client for client in sorted(staying) if next_of[client] == last_of[client]]
        if through and data.draw(st.booleans()):
            leaving = data.draw(st.sampled_from(through))
            assert not dispatcher.computes_for(leaving)
            staying.remove(leaving)
            dispatcher.leave(leaving)
            events.append(("leave", Packet(StepKey(1, leaving, 0))))
    assert len(answers) == sum(last_of.values())
    for name, packet in events:
        if name == "leave":
            alone.leave(packet.key.client)
            continue
        (expected,) = (alone.forward_together if name == "hidden" else alone.backward_together)([packet])
        got = answers[name, packet.key]
        assert isinstance(got, Packet)
        assert {n: e.array("values").tobytes() for n, e in got.tensors.items()} == {
            n: e.array("values").tobytes() for n, e in expected.tensors.items()
        }
    for trunk in (beside, alone):
        trunk.end_round(range(clients))
    theirs, ours = beside.adapters.read().tensors, alone.adapters.read().tensors
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert beside.traffic == alone.traffic
