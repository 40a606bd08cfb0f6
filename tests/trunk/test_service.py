"""The service: requests of any thread are done in one, observers see all of it, and messages wait for workers."""

from __future__ import annotations

import queue
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCABULARY
from torch import Tensor

from fedsplit.adaptation import lora
from fedsplit.clock import ManualClock
from fedsplit.lowrank import LowRank
from fedsplit.model.parts import Trunk
from fedsplit.model.split import load_parts
from fedsplit.settings.documents import build
from fedsplit.settings.sections import LoraSettings, TrainSettings, TrunkSettings
from fedsplit.trunk import port
from fedsplit.trunk.local import LocalTrunk
from fedsplit.trunk.requests import Answer
from fedsplit.trunk.server import TrunkServer
from fedsplit.trunk.service import Observer, TrunkService
from fedsplit.trunk.status import RoundCounts
from fedsplit.wire.codecs import make_codec
from fedsplit.wire.packets import Packet, StepKey
from fedsplit.wire.steps import RefusedStep, SpoiledStep, StaleStep

RAW = make_codec("raw")
WIDTH = 32
assert VOCABULARY


@pytest.fixture
def part(tiny_models: dict[str, Any]) -> Trunk:
    (part,) = load_parts(tiny_models["gpt2"], (1, 2), ["trunk"])
    lora.add(part, LoraSettings(rank=(2,), dropout=0.0), seed=0)
    trunk: Trunk = part
    return trunk


def service_of(part: Trunk, *observers: Observer, **how: Any) -> TrunkService:
    server = TrunkServer(part, RAW, "shared", TrainSettings(), 0, incarnation="first", clock=how.get("clock", float))
    how.setdefault("clock", float)
    return TrunkService(server, TrunkSettings(**how.pop("settings", {})), observers=observers, **how)


def packet(client: int, what: str = "hidden", session: str = "", step: int = 0) -> Packet:
    tensor = torch.randn(1, 3, WIDTH, generator=torch.Generator().manual_seed(client))
    key = StepKey(1, client, step, session=session)
    return Packet(key, {what: RAW.encode(tensor)}, training=not session, incarnation="first")


def asked(service: TrunkService, message: port.Control[Any]) -> Any:
    """The reply to a message, once all that can be done now is done."""
    replies: list[Any] = []
    service.request(message, replies.append)
    while service.work_now():
        pass
    (reply,) = replies
    return reply


def sent(service: TrunkService, one: Packet) -> Answer:
    """The answer to a packet, once all that can be done now is done."""
    answers: list[Answer] = []
    service.submit(one, answers.append)
    while service.work_now():
        pass
    (answer,) = answers
    return answer


class Watch:
    """Remembers what it sees, and raises what it is told to."""

    def __init__(self, before: Exception | None = None, after: Exception | None = None) -> None:
        self.seen: list[tuple[str, Any]] = []
        self.fails = {"before": before, "after": after}

    def _note(self, what: str, value: Any) -> None:
        self.seen.append((what, value))
        if (failure := self.fails[what]) is not None:
            raise failure

    def before(self, packet: Packet) -> None:
        self._note("before", packet)

    def after(self, packet: Packet, answer: Answer) -> None:
        self._note("after", answer)


def test_observers_see_every_packet_go_in_and_every_answer_go_out(part: Trunk) -> None:
    """A refused one too, and those of sessions."""
    watch = Watch()
    service = service_of(part, watch)
    packets = [packet(0), packet(0, "gradient"), packet(1, "gradient"), packet(2, session="s")]
    answers = [sent(service, one) for one in packets]
    assert [seen for what, seen in watch.seen if what == "before"] == packets
    assert [seen for what, seen in watch.seen if what == "after"] == answers
    assert [type(answer) for answer in answers[:2]] == [Packet, Packet]
    assert isinstance(answers[2], RefusedStep)
    assert [what for what, _ in watch.seen] == ["before", "after"] * 4


def test_an_observer_may_refuse_a_packet_which_is_then_not_served(part: Trunk) -> None:
    second = Watch()
    service = service_of(part, Watch(before=StaleStep("not now")), second)
    answer = sent(service, packet(0))
    assert isinstance(answer, StaleStep) and asked(service, port.ReadStatus()).pending == 0
    assert second.seen == [("after", answer)]


def test_what_an_observer_raises_does_not_end_the_service(part: Trunk) -> None:
    service = service_of(part, Watch(after=ZeroDivisionError("a defect")))
    assert isinstance(sent(service, packet(0)), ZeroDivisionError)
    assert isinstance(sent(service, packet(1)), ZeroDivisionError)
    assert asked(service, port.ReadStatus()).pending == 2


def test_each_message_does_what_it_says(part: Trunk) -> None:
    service = service_of(part)
    start = asked(service, port.ReadAdapter())
    assert isinstance(sent(service, packet(0)), Packet) and isinstance(sent(service, packet(0, "gradient")), Packet)
    learned, moments = asked(service, port.ReadAdapter()), asked(service, port.ReadMoments())
    assert any(not torch.equal(learned.tensors[name], tensor) for name, tensor in start.tensors.items())
    assert asked(service, port.EndRound((0,))) == RoundCounts(steps=1, forwards=1, backwards=1, sequences=1)

    asked(service, port.WriteAdapter(start.tensors))
    assert all(torch.equal(t, start.tensors[n]) for n, t in asked(service, port.ReadAdapter()).tensors.items())
    asked(service, port.Restore(learned.tensors, moments))
    assert all(torch.equal(t, learned.tensors[n]) for n, t in asked(service, port.ReadAdapter()).tensors.items())
    assert asked(service, port.ReadCopies((0, 1))) == {}

    asked(service, port.BeginGroup((1,)))
    assert isinstance(sent(service, packet(2)), StaleStep)
    assert isinstance(sent(service, packet(1)), Packet)
    asked(service, port.Leave(1))
    assert asked(service, port.ReadStatus()).pending == 0
    assert asked(service, port.EndRound(())).abandoned == 1


def test_sessions_end_when_their_client_leaves_and_when_weights_change(part: Trunk) -> None:
    service = service_of(part)
    for client in (0, 1):
        assert isinstance(sent(service, packet(client, session=f"s{client}")), Packet)
    assert asked(service, port.ReadStatus()).sessions == 2
    asked(service, port.Leave(0))
    assert asked(service, port.ReadStatus()).sessions == 1
    name = next(name for name in lora.read(part).layers)
    rows, columns = (lora.read(part).tensors[f"{name}.lora_{ab}.weight"].shape[d] for ab, d in (("B", 0), ("A", 1)))
    asked(service, port.Fold({name: LowRank(torch.zeros(rows, 1), torch.zeros(1, columns))}))
    assert asked(service, port.ReadStatus()).sessions == 0


def test_the_status_is_of_the_moment(part: Trunk) -> None:
    service = service_of(part, least_memory=7)
    before = asked(service, port.ReadStatus())
    sent(service, packet(0))
    after = asked(service, port.ReadStatus())
    assert (before.pending, after.pending, before.incarnation, before.least_memory) == (0, 1, "first", 7)
    assert before.traffic.document() == {} and after.traffic.activation.up == packet(0).nbytes
    assert after.parameters["trainable"] > 0 and after.peak_memory >= 10**7


def test_what_is_no_packet_or_no_message_is_refused(part: Trunk) -> None:
    service = service_of(part)
    answers: list[Answer] = []
    service.submit("no packet", answers.append)  # type: ignore[arg-type]
    service.submit(replace(packet(0), micros=0), answers.append)
    assert [type(answer) for answer in answers] == [SpoiledStep, SpoiledStep]

    class Strange(port.Control[None]):
        pass

    assert "knows no message Strange" in str(asked(service, Strange()))


def test_requests_of_any_thread_are_carried_out_in_one(part: Trunk) -> None:
    service = service_of(part)
    found: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()

    def note(reply: Any) -> None:
        found.put((threading.current_thread().name, reply))

    threads = [threading.Thread(target=service.request, args=(port.ReadStatus(), note)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    service.work()
    names = [found.get(timeout=10)[0] for _ in range(3)]
    assert names == [threading.current_thread().name] * 3


def test_a_lease_wakes_the_service(part: Trunk) -> None:
    clock = ManualClock()
    service = service_of(part, clock=clock, settings={"lease": 5.0})
    sent(service, packet(0, session="s"))
    assert service.wakes_at() == 5.0
    clock.advance_to(5.0)
    service.work()  # returns at once, without a request
    assert asked(service, port.ReadStatus()).sessions == 0


class ByHand:
    """Workers that compute when they are told to."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Any, Any]] = []

    def start(self, worker: str, compute: Any, done: Any) -> None:
        self.waiting.append((compute, done))

    def end(self) -> None:
        compute, done = self.waiting.pop(0)
        done(compute())


def test_a_message_waits_for_workers_and_nothing_new_is_begun_before_it(part: Trunk) -> None:
    service, workers = service_of(part), ByHand()
    service._dispatcher._workers = workers
    answers: list[Answer] = []
    replies: list[Any] = []
    service.submit(packet(0), answers.append)
    while service.work_now():
        pass
    service.request(port.ReadStatus(), replies.append)
    service.submit(packet(1), answers.append)
    service.request(port.Leave(2), lambda _: replies.append("left"))  # for whom nothing is computed
    while service.work_now():
        pass
    assert replies == ["left"] and len(workers.waiting) == 1
    workers.end()
    while service.work_now():
        pass
    assert replies[1].pending == 1 and len(workers.waiting) == 1
    workers.end()
    assert len(answers) == 2


def test_changes_of_base_weights_are_taken_back_until_they_are_committed(tiny_models: dict[str, Path]) -> None:
    """To the bit; of what was committed before, nothing is."""
    trunk = LocalTrunk(build({"model": str(tiny_models["gpt2"]), "cut": "1:2", "lora.rank": 2}))
    (layer, *_) = trunk.read().complete
    shape = trunk.read().change(layer).shape

    def weights() -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in trunk.server.part.state_dict().items()}

    def change(size: float) -> dict[str, LowRank]:
        return {layer: LowRank(torch.full((shape[0], 1), size), torch.ones(1, shape[1]))}

    start = weights()
    trunk.fold(change(0.3))
    trunk.commit()
    committed = weights()
    assert any(not torch.equal(tensor, start[name]) for name, tensor in committed.items())
    trunk.fold(change(0.1))
    trunk.fold(change(0.7))
    assert any(not torch.equal(tensor, committed[name]) for name, tensor in weights().items())
    trunk.unfold()
    trunk.unfold()  # once more changes nothing
    assert all(torch.equal(tensor, committed[name]) for name, tensor in weights().items())


def test_a_closed_service_wakes_the_thread_that_works_and_ends_its_workers(tiny_models: dict[str, Path]) -> None:
    before = set(threading.enumerate())
    service = LocalTrunk(build({"model": str(tiny_models["gpt2"]), "cut": "1:2"})).service
    both = TrunkService(service.server, TrunkSettings(), workers=2)
    working = threading.Thread(target=both.work, daemon=True)
    working.start()
    both.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
        assert not thread.is_alive(), thread.name
