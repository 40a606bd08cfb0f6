"""A trunk that serves run after run: terms are compared, an old run ends with an answer for everybody, errors cross."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fedsplit.clock import ManualClock
from fedsplit.trunk import port
from fedsplit.trunk.control_bytes import message_as_bytes, reply_from_bytes
from fedsplit.trunk.run_terms import BeginRun, Begun, FinishRun, Terms
from fedsplit.trunk.served import ServedRun, ServedTrunk
from fedsplit.trunk.status import Traffic, TrunkStatus
from fedsplit.wire.frames import TrunkFailed
from fedsplit.wire.packets import Packet, StepKey
from fedsplit.wire.steps import ForeignStep
from fedsplit.wire.transport import TrunkLost
from fedsplit.wire.typed_values import MalformedValue

TERMS = Terms({"seed": "0"}, {"config.json": "a"}, {}, "1.0")
PACKET = Packet(StepKey(round=1, client=0, step=0))
SECONDS = 60.0


class Service:
    """A service that answers packets on its own thread, or never."""

    def __init__(self, run: str, incarnation: str, is_silent: bool = False) -> None:
        self.run = run
        self.incarnation = incarnation
        self.is_silent = is_silent
        self.is_closed = False
        self.arrived = threading.Semaphore(0)
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def submit(self, packet: Packet, done: Callable[[Any], None]) -> None:
        self.arrived.release()
        if not self.is_silent:
            self._calls.put(lambda: done(packet))

    def request(self, message: port.Control[Any], done: Callable[[Any], None]) -> None:
        self.arrived.release()
        if not self.is_silent:
            self._calls.put(lambda: done(self._reply(message)))

    def _reply(self, message: port.Control[Any]) -> Any:
        match message:
            case port.ReadStatus():
                return TrunkStatus(self.incarnation, Traffic(), 0, 0, 0, 0, {})
            case port.MeasureStep():
                return "no number"  # a defect: the declared reply is a float
            case port.Commit():
                return KeyError("a layer")
        return None

    def work(self) -> None:
        self._calls.get()()

    def close(self) -> None:
        self.is_closed = True
        self._calls.put(lambda: None)


class Loader:
    """Loads services, and remembers them."""

    def __init__(self) -> None:
        self.loaded: list[Service] = []
        self.is_silent = False
        self.fails = False

    def __call__(self, run: str, incarnation: str) -> Any:
        if self.fails:
            raise OSError("the weights are gone")
        self.loaded.append(Service(run, incarnation, self.is_silent))
        return self.loaded[-1]


@pytest.fixture
def loader() -> Loader:
    return Loader()


@pytest.fixture
def trunk(loader: Loader) -> Iterator[ServedTrunk]:
    served = ServedTrunk(loader, TERMS)
    yield served
    served.close()


def asked(trunk: ServedTrunk, message: Any, run: str = "") -> Any:
    """Sends a control message, and waits for the reply."""
    replies: queue.SimpleQueue[Any] = queue.SimpleQueue()
    trunk.control(message_as_bytes(message, run), replies.put)
    return reply_from_bytes(type(message), replies.get(timeout=SECONDS))


def served(trunk: ServedTrunk, packet: Packet) -> Any:
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    trunk.serve(packet, answers.put)
    return answers.get(timeout=SECONDS)


def test_the_first_run_has_the_trunk_that_was_loaded_at_the_start(trunk: ServedTrunk, loader: Loader) -> None:
    assert len(loader.loaded) == 1
    begun = asked(trunk, BeginRun(TERMS))
    assert begun == Begun(loader.loaded[0].run, loader.loaded[0].incarnation)
    assert served(trunk, PACKET) == PACKET
    status = asked(trunk, port.ReadStatus(), begun.run)
    assert (status.incarnation, status.over_socket) == (begun.incarnation, 1)


def test_every_further_run_has_a_fresh_trunk_of_another_name(trunk: ServedTrunk, loader: Loader) -> None:
    """After the end of the run before, and after its loss."""
    runs = [asked(trunk, BeginRun(TERMS))]
    assert asked(trunk, FinishRun(), runs[0].run) is None
    runs.append(asked(trunk, BeginRun(TERMS, "me")))
    runs.append(asked(trunk, BeginRun(TERMS, "me")))
    assert [run.run for run in runs] == [service.run for service in loader.loaded]
    assert len({run.run for run in runs} | {run.incarnation for run in runs}) == 6
    assert [service.is_closed for service in loader.loaded] == [True, True, False]


def test_other_terms_are_refused_by_name_and_the_run_goes_on(trunk: ServedTrunk) -> None:
    begun = asked(trunk, BeginRun(TERMS))
    other = dataclasses.replace(TERMS, settings={"seed": "1"})
    assert asked(trunk, BeginRun(other)) == Begun(differences=("seed (0 at the trunk, 1 in the run)",))
    assert asked(trunk, port.ReadStatus(), begun.run).incarnation == begun.incarnation


def test_before_a_run_has_begun_nobody_is_served(trunk: ServedTrunk) -> None:
    """As after a restart of the process."""
    assert isinstance(served(trunk, PACKET), ForeignStep)
    with pytest.raises(TrunkLost, match="no run has begun"):
        asked(trunk, port.ReadStatus(), "trunk-of-yesterday")


def test_messages_of_an_earlier_run_find_the_trunk_lost(trunk: ServedTrunk) -> None:
    first = asked(trunk, BeginRun(TERMS, "me"))
    second = asked(trunk, BeginRun(TERMS, "me"))
    for message in (port.ReadStatus(), FinishRun()):
        with pytest.raises(TrunkLost, match="serves another run"):
            asked(trunk, message, first.run)
    assert asked(trunk, port.Unfold(), second.run) is None


@pytest.mark.parametrize("owner", ["", "me"])
def test_a_second_run_is_refused_until_the_first_one_ends_or_is_abandoned(owner: str, loader: Loader) -> None:
    """So that two federations do not take the trunk from each other."""
    clock = ManualClock()
    trunk = ServedTrunk(loader, TERMS, timeout=100.0, clock=clock)
    first = asked(trunk, BeginRun(TERMS, owner))
    clock.advance_to(60.0)
    asked(trunk, port.ReadStatus(), first.run)
    for other in ("", "somebody else"):
        clock.advance_to(159.0)
        assert asked(trunk, BeginRun(TERMS, other)) == Begun(is_busy=True)
    clock.advance_to(161.0)
    assert asked(trunk, BeginRun(TERMS)).run not in ("", first.run)
    trunk.close()


def test_who_waits_for_a_run_that_ends_gets_an_answer(loader: Loader) -> None:
    loader.is_silent = True
    trunk = ServedTrunk(loader, TERMS)
    begun = asked(trunk, BeginRun(TERMS, "me"))
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    replies: queue.SimpleQueue[Any] = queue.SimpleQueue()
    trunk.serve(PACKET, answers.put)
    trunk.control(message_as_bytes(port.ReadStatus(), begun.run), replies.put)
    for _ in range(2):
        assert loader.loaded[0].arrived.acquire(timeout=SECONDS)
    asked(trunk, BeginRun(TERMS, "me"))
    assert isinstance(answers.get(timeout=SECONDS), ForeignStep)
    with pytest.raises(TrunkLost, match="the run is over"):
        reply_from_bytes(port.ReadStatus, replies.get(timeout=SECONDS))
    trunk.close()


def test_a_late_answer_of_a_run_that_is_over_is_dropped(loader: Loader) -> None:
    loader.is_silent = True
    run = ServedRun(loader, threads=1)
    answers: list[Any] = []
    late: list[Callable[[Any], None]] = []
    loader.loaded[0].submit = lambda packet, done: late.append(done)  # type: ignore[method-assign]
    run.submit(PACKET, answers.append)
    run.close()
    late[0](PACKET)
    run.submit(PACKET, answers.append)
    assert [type(answer) for answer in answers] == [ForeignStep, ForeignStep]


@pytest.mark.parametrize(("message", "words"), [(port.Commit(), "KeyError"), (port.MeasureStep(), "Error")], ids=str)
def test_errors_cross_and_the_trunk_goes_on(message: Any, words: str, trunk: ServedTrunk) -> None:
    """Those of the trunk, and a reply that has no form."""
    begun = asked(trunk, BeginRun(TERMS))
    with pytest.raises(TrunkFailed, match=words):
        asked(trunk, message, begun.run)
    assert asked(trunk, port.Unfold(), begun.run) is None


def test_bytes_that_are_no_message_are_refused_and_the_trunk_goes_on(trunk: ServedTrunk) -> None:
    replies: queue.SimpleQueue[Any] = queue.SimpleQueue()
    trunk.control(b"nonsense", replies.put)
    with pytest.raises(MalformedValue):
        reply_from_bytes(port.Commit, replies.get(timeout=SECONDS))
    assert asked(trunk, BeginRun(TERMS)).run


def test_a_trunk_that_cannot_be_loaded_again_says_why(trunk: ServedTrunk, loader: Loader) -> None:
    asked(trunk, BeginRun(TERMS, "me"))
    loader.fails = True
    with pytest.raises(TrunkFailed, match="the weights are gone"):
        asked(trunk, BeginRun(TERMS, "me"))
    loader.fails = False
    assert asked(trunk, BeginRun(TERMS)).run
