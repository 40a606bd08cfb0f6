"""A trunk in the process of the caller, without threads: equal requests give equal results, bit for bit."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from fedsplit.clock import ManualClock
from fedsplit.settings.config import Config
from fedsplit.stages import StageMaker
from fedsplit.trunk.port import Control, Reply, TrunkPort
from fedsplit.trunk.service import Observer, TrunkService, load_service
from fedsplit.wire.packets import Packet
from fedsplit.wire.transport import PendingAnswer, TrunkLost

_FOUND_BY: dict[str, LocalTrunk] = {}
"""Trunks of this process by the names that clients find them by."""


class LocalTrunk(TrunkPort):
    """A trunk that computes in its caller's thread, whenever an answer is waited for.

    With one caller, its clock stands still while there is anything to do, and moves to the next deadline when there is
    not. So no deadline depends on how fast the machine is. With several callers the clock is the machine's, and one of
    those that wait computes at a time, for all of them.

    A memory budget is not kept to, since the process is not the trunk's own.

    Attributes:
        service: The service that this is a door to.
        server: Its trunk.
    """

    def __init__(
        self,
        config: Config,
        run: str = "",
        incarnation: str = "first",
        observers: Sequence[Observer] = (),
        stage: StageMaker | None = None,
        callers: int = 1,
    ) -> None:
        """Loads the trunk's blocks.

        Args:
            config: Configuration of the run.
            run: Name of the run, which packets must carry.
            incarnation: Id of this life of the trunk, which packets must carry.
            observers: Observers of packets and answers.
            stage: Makes the strategy's gradient stage for a client's copy; None where the strategy has none.
            callers: Number of threads that send packets.
        """
        self._clock = ManualClock() if callers == 1 else None
        self._is_open = True
        self._deciding = threading.Lock()
        self._news = threading.Condition()
        self._sent = 0
        self.service: TrunkService = load_service(
            config, run, incarnation, stage=stage, observers=observers, clock=self._clock or time.monotonic
        )
        self.server = self.service.server

    def send(self, packet: Packet) -> PendingAnswer:
        """Queues a packet; nothing is computed before the answer is waited for."""
        self._check_open()
        answers: list[Any] = []
        self.service.submit(packet, answers.append)
        self._tell()

        def wait() -> Packet:
            while not answers:
                self._work_for(packet, answers)
            answer = answers[0]
            if isinstance(answer, Exception):
                raise answer
            return answer

        return wait

    def _work_for(self, packet: Packet, answers: Sequence[Any]) -> None:
        """Does one thing that there is to do, or waits for a packet of another thread."""
        sent = self._sent
        with self._deciding:
            self._check_open()
            if answers:  # another thread has computed it meanwhile
                return
            if self.service.work_now():
                self._tell()
                return
            wakes = self.service.wakes_at()
        if self._clock is not None:
            self._pass_time(packet, wakes)
            return
        with self._news:
            timeout = None if wakes is None else max(0.0, wakes - time.monotonic())
            self._news.wait_for(lambda: self._sent != sent, timeout)

    def _tell(self) -> None:
        """Wakes the threads that wait: there is a new packet, a new answer, or no trunk any more."""
        with self._news:
            self._sent += 1
            self._news.notify_all()

    def _pass_time(self, packet: Packet, wakes: float | None) -> None:
        """Moves the clock to the next deadline.

        Raises:
            RuntimeError: There is none: the answer depends on a packet that only this thread could send.
        """
        assert self._clock is not None
        if wakes is None:
            raise RuntimeError(f"{packet.key} waits for another client, which this thread would have to play")
        self._clock.advance_to(wakes)

    def control(self, message: Control[Reply]) -> Reply:
        """Carries out a control message, after all packets and messages that came earlier were queued."""
        replies: list[Any] = []
        with self._deciding:
            self._check_open()
            self.service.request(message, replies.append)
            self.service.take_requests()
        self._tell()
        reply = replies[0]
        if isinstance(reply, Exception):
            raise reply
        return reply

    def close(self) -> None:
        """Ends the trunk; every later call raises `TrunkLost`."""
        self._is_open = False
        self._tell()

    def _check_open(self) -> None:
        if not self._is_open:
            raise TrunkLost("the trunk of this process was closed")


@contextlib.contextmanager
def named(trunk: LocalTrunk, name: str) -> Iterator[LocalTrunk]:
    """Registers a trunk under a name inside the context, so that clients of this process find it; then closes it.

    Args:
        trunk: The trunk.
        name: Name that `find_trunk` finds it by.
    """
    _FOUND_BY[name] = trunk
    try:
        yield trunk
    finally:
        del _FOUND_BY[name]
        trunk.close()


def find_trunk(name: str) -> LocalTrunk | None:
    """Returns the trunk of this process with a name; None if there is no such trunk."""
    return _FOUND_BY.get(name)
