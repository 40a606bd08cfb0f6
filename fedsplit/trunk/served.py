"""A trunk in a process of its own, which serves run after run: packets and control requests in, answers out.

The module knows neither gRPC nor the command line. A server passes in what comes from other processes.
"""

from __future__ import annotations

import functools
import gc
import itertools
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fedsplit.clock import Clock
from fedsplit.trunk.control_bytes import error_as_bytes, message_from_bytes, reply_as_bytes
from fedsplit.trunk.port import Control
from fedsplit.trunk.requests import Done
from fedsplit.trunk.run_terms import BeginRun, Begun, FinishRun, Terms
from fedsplit.trunk.service import TrunkService
from fedsplit.trunk.status import TrunkStatus
from fedsplit.trunk.workers import run_until_defect
from fedsplit.wire.packets import Packet, new_incarnation, new_trunk_name
from fedsplit.wire.steps import ForeignStep
from fedsplit.wire.transport import TrunkLost

Load = Callable[[str, str], TrunkService]
"""Loads a fresh trunk with the name of a run and the identity of this start of the trunk."""

Reply = Callable[[bytes | Exception], None]
"""Takes the reply to a control request, as bytes."""

_END_SECONDS = 30.0
"""Time for the last step of a run that is over. A thread that takes longer is left behind."""


class ServedRun:
    """One run at a trunk: the service, the thread that decides, and the requests without an answer.

    Attributes:
        name: Name of the run.
        incarnation: Identity of this start of the trunk.
        owner: Identity of the run for its operator; empty for none.
        heard: Time of the last request.
    """

    def __init__(self, load: Load, threads: int, clock: Clock = time.monotonic) -> None:
        """Loads a fresh trunk, and starts the thread.

        Args:
            load: Loads the trunk.
            threads: Threads that torch may use in the deciding thread.
            clock: Clock for the time of the last request.
        """
        self._clock = clock
        self.heard = clock()
        self.owner = ""
        self.name = new_trunk_name()
        self.incarnation = new_incarnation()
        self._service = load(self.name, self.incarnation)
        self._guard = threading.Lock()
        self._numbers = itertools.count()
        self._waiting: dict[int, tuple[Callable[[Any], None], Exception]] = {}
        self._is_over = False
        self._thread = threading.Thread(
            target=run_until_defect,
            args=(self._service.work, threads, lambda: self._is_over),
            name="trunk",
            daemon=True,  # a long step must not keep an ending process alive
        )
        self._thread.start()

    def submit(self, packet: Packet, done: Done) -> None:
        """Serves a packet, as `TrunkService.submit` does. After the end of the run, the packet is refused."""
        over = ForeignStep(f"{packet.key}: the run is over")
        settle = self._entered(done, over)
        if settle is None:
            done(over)
        else:
            self._service.submit(packet, settle)

    def request(self, message: Control[Any], done: Callable[[Any], None]) -> None:
        """Carries out a control message, as `TrunkService.request` does. After the run's end, the trunk is lost."""
        over = TrunkLost("the run is over")
        settle = self._entered(done, over)
        if settle is None:
            done(over)
        else:
            self._service.request(message, settle)

    def close(self) -> None:
        """Ends the run. Every request without an answer gets an error: nobody may wait for ever."""
        with self._guard:
            self._is_over = True
            waiting = list(self._waiting.values())
            self._waiting.clear()
        # Before the thread is waited for, which may be in a long step.
        for done, over in waiting:
            done(over)
        self._service.close()
        self._thread.join(_END_SECONDS)

    def _entered(self, done: Callable[[Any], None], over: Exception) -> Callable[[Any], None] | None:
        """Notes a request without an answer.

        Args:
            done: Takes the answer.
            over: Answer if the run ends before.

        Returns:
            The function to call with the answer; None if the run is over.
        """
        self.heard = self._clock()
        with self._guard:
            if self._is_over:
                return None
            number = next(self._numbers)
            self._waiting[number] = done, over
        return functools.partial(self._settle, number)

    def _settle(self, number: int, answer: Any) -> None:
        """Passes on an answer, once."""
        with self._guard:
            done, _ = self._waiting.pop(number, (None, None))
        if done is not None:
            done(answer)


class ServedTrunk:
    """A trunk for run after run.

    Any thread may call `serve` and `control`; both return at once. A thread of this class reads control requests and
    loads trunks. The replies are written by the thread of the run, since a later step may change the same tensors.
    """

    def __init__(
        self,
        load: Load,
        terms: Terms,
        threads: int = 1,
        timeout: float = 600.0,
        clock: Clock = time.monotonic,
    ) -> None:
        """Loads the trunk of the first run, so that what is wrong with the model is known at once.

        Args:
            load: Loads a fresh trunk.
            terms: Terms on which the trunk serves runs.
            threads: Threads that torch may use in the deciding thread.
            timeout: Seconds without a request after which a run is abandoned, so that another one can begin.
            clock: Clock for the timeout.
        """
        self._timeout = timeout
        self._clock = clock
        self._load = load
        self._terms = terms
        self._threads = threads
        self._packets = 0
        self._run: ServedRun | None = None
        self._prepared: ServedRun | None = ServedRun(load, threads, clock)
        self._requests: queue.SimpleQueue[tuple[bytes, Reply] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._answer_requests, name="control", daemon=True)
        self._thread.start()

    def serve(self, packet: Packet, done: Done) -> None:
        """Serves a packet.

        Args:
            packet: The packet.
            done: Called with the answer, or with the error in place of an answer. A packet of an earlier run, or of an
                earlier start of the process, gets a `ForeignStep`.
        """
        self._packets += 1
        run = self._run
        if run is None:
            done(ForeignStep(f"{packet.key}: no run has begun at this trunk"))
        else:
            run.submit(packet, done)

    def control(self, request: bytes, done: Reply) -> None:
        """Carries out a control request.

        Args:
            request: The request, in the form of `fedsplit.trunk.control_bytes`.
            done: Called with the reply. An error crosses as bytes, too.
        """
        self._requests.put((request, done))

    def close(self) -> None:
        """Ends the run, after the control requests that have come."""
        self._requests.put(None)
        self._thread.join(_END_SECONDS)
        for run in (self._run, self._prepared):
            if run is not None:
                run.close()

    def _answer_requests(self) -> None:
        """Carries out control requests until a None comes."""
        while (request := self._requests.get()) is not None:
            self._answer(*request)

    def _answer(self, request: bytes, done: Reply) -> None:
        """Carries out one control request, or passes the request on to the run."""
        try:
            message, name = message_from_bytes(request)
            if isinstance(message, BeginRun):
                done(reply_as_bytes(BeginRun, self._begin(message)))
                return
            run = self._run
            if run is None or run.name != name:
                raise TrunkLost("no run has begun at this trunk" if run is None else "the trunk serves another run")
            if isinstance(message, FinishRun):
                self._finish()
                done(reply_as_bytes(FinishRun, None))
                return
        except Exception as error:  # noqa: BLE001  # the operator's to read, whatever went wrong
            done(error_as_bytes(error))
        else:
            run.request(message, lambda reply: done(self._as_bytes(type(message), reply)))

    def _begin(self, message: BeginRun) -> Begun:
        """Begins a run, if its terms are those of the trunk, and no run of somebody else goes on."""
        differences = self._terms.differences(message.terms)
        if differences:
            return Begun(differences=differences)
        if self._is_busy_for(message.owner):
            return Begun(is_busy=True)
        self._finish()  # before the new weights come: memory need not hold both
        run = self._prepared or ServedRun(self._load, self._threads, self._clock)
        self._prepared = None
        run.owner = message.owner
        self._run = run
        return Begun(run.name, run.incarnation)

    def _is_busy_for(self, owner: str) -> bool:
        """Returns True if the current run goes on, and is not the one that begins again."""
        run = self._run
        if run is None or (owner and owner == run.owner):
            return False
        return self._clock() - run.heard < self._timeout

    def _finish(self) -> None:
        """Ends the current run, if there is one."""
        if self._run is not None:
            self._run.close()
            self._run = None
            # Objects that refer to each other would keep the weights of the run until a later collection.
            gc.collect()

    def _as_bytes(self, kind: type[Any], reply: Any) -> bytes:
        """Returns a reply, or the error in its place, as bytes. A status has the number of packets that have come."""
        if isinstance(reply, TrunkStatus):
            reply = replace(reply, over_socket=self._packets)
        try:
            return reply_as_bytes(kind, reply)
        except Exception as error:  # noqa: BLE001  # a defect of one message must not end the run's thread
            return error_as_bytes(error)
