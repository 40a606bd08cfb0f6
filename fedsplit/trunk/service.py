"""The trunk as a service: takes packets and control messages from any thread, and serves all of them on one thread.

The service knows neither Ray nor sockets. A door passes packets and messages in, and provides the thread.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fedsplit.adaptation import run_adapters
from fedsplit.clock import Clock
from fedsplit.lowrank import LowRank
from fedsplit.model.parts import Trunk
from fedsplit.network.trace import Trace
from fedsplit.settings.config import Config
from fedsplit.settings.sections import TrunkSettings
from fedsplit.stages import StageMaker
from fedsplit.trunk import port
from fedsplit.trunk.blocks import Blocks
from fedsplit.trunk.dispatch import Dispatcher
from fedsplit.trunk.memory import Budget, peak_memory, resident_memory
from fedsplit.trunk.requests import Answer, Done
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.trunk.server import TrunkServer
from fedsplit.trunk.sessions import Sessions
from fedsplit.trunk.spans import Span
from fedsplit.trunk.status import TrunkStatus
from fedsplit.trunk.step_sync import Join, first_of
from fedsplit.trunk.workers import BACKWARD, FORWARD, WorkerThreads, outcome
from fedsplit.wire.encoded import MalformedPacket
from fedsplit.wire.packets import Packet, check_form
from fedsplit.wire.steps import SpoiledStep


class Observer(Protocol):
    """Observer of all packets that reach a trunk, and of all answers.

    Both methods run on the deciding thread, so an observer needs no locks and should be quick. An exception becomes
    the answer to the packet. After an exception from `before`, the trunk does not serve the packet.

    Example:
        >>> class Counter:
        ...     packets = 0
        ...     def before(self, packet):
        ...         self.packets += 1
        ...     def after(self, packet, answer):
        ...         pass
    """

    def before(self, packet: Packet) -> None:
        """Receives a packet on arrival, before the packet is served or waits."""
        ...

    def after(self, packet: Packet, answer: Answer) -> None:
        """Receives the answer to a packet, or the error in place of an answer, before the client does."""
        ...


@dataclass(frozen=True)
class _Call:
    """A call for the deciding thread.

    Attributes:
        do: The call.
        has_to_wait: Function that returns True while the call must wait for workers. No later work begins before a
            waiting call.
    """

    do: Callable[[], None]
    has_to_wait: Callable[[], bool]


class TrunkService:
    """Runs a dispatcher and decoding sessions on one trunk.

    Any thread may call `submit` and `request`; both return at once. One thread does the work. In a trunk's process, the
    thread repeats `work` for ever. In the process of the callers, a waiting caller repeats `work_now`. With two
    workers, a second thread computes forwards and a third thread computes backwards.

    Attributes:
        server: The trunk.
    """

    def __init__(
        self,
        server: TrunkServer,
        settings: TrunkSettings,
        *,
        threads: int = 1,
        workers: int = 1,
        least_memory: int = 0,
        observers: Sequence[Observer] = (),
        clock: Clock = time.monotonic,
    ) -> None:
        """Starts without requests.

        Args:
            server: The trunk.
            settings: Settings of the trunk.
            threads: Threads that torch may use in each worker.
            workers: 2 to compute a forward and a backward at the same time; 1 to compute in the deciding thread.
            least_memory: Smallest sufficient memory budget in bytes; 0 without a budget.
            observers: Observers of packets and answers.
            clock: Clock for leases and deadlines.
        """
        self.server = server
        self._clock = clock
        self._least_memory = least_memory
        self._observers = observers
        self._calls: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        self._held: list[_Call] = []
        self._beside = WorkerThreads([FORWARD, BACKWARD], threads, self._post) if workers > 1 else None
        self._dispatcher = Dispatcher(server, settings, clock, self._beside)
        self._sessions = Sessions(server, settings.lease, clock=clock)

    def submit(self, packet: Packet, done: Done) -> None:
        """Takes a packet.

        Args:
            packet: The packet. A stranger's packet may have any form.
            done: Called by the deciding thread with the answer, or with the error in place of an answer.
        """
        try:
            check_form(packet)
        except MalformedPacket as error:  # on the deciding thread, a wrong type could end the service for all clients
            done(SpoiledStep(str(error)))
            return
        # A session computes on this thread, with the modules of the trunk: no worker may use the modules meanwhile.
        has_to_wait = self._is_busy if packet.key.session else _never
        self._post(lambda: self._serve(packet, done), has_to_wait)

    def request(self, message: port.Control[Any], done: Callable[[Any], None]) -> None:
        """Takes a control message.

        Args:
            message: The message.
            done: Called by the deciding thread with the reply or an exception.
        """

        def has_to_wait() -> bool:
            if isinstance(message, port.Leave):  # only work for the leaving client must end before
                return self._dispatcher.computes_for(message.client)
            return self._is_busy()

        self._post(lambda: done(outcome(lambda: self._carry_out(message))), has_to_wait)

    def work(self) -> None:
        """Waits for a request, a deadline or the end of a lease, and does all work that is ready afterwards."""
        # No timeout while a worker computes: the worker's result comes as a call.
        wakes = None if self._dispatcher.is_computing else self.wakes_at()
        timeout = None if wakes is None else max(0.0, wakes - self._clock())
        with contextlib.suppress(queue.Empty):
            self._do(self._calls.get(timeout=timeout))
        self.take_requests()
        while self._advance():
            self.take_requests()

    def work_now(self) -> bool:
        """Does the next piece of work that is ready. Returns False if nothing is ready."""
        self.take_requests()
        return self._advance()

    def take_requests(self) -> None:
        """Carries out the control messages that have come, and queues the packets."""
        while not self._calls.empty():
            self._do(self._calls.get())

    def wakes_at(self) -> float | None:
        """Returns the time of the next deadline or expiry, after which there may be work without a request."""
        times = (self._dispatcher.wakes_at(), self._sessions.next_expiry())
        return min((time for time in times if time is not None), default=None)

    def close(self) -> None:
        """Ends the threads of the service, and wakes a thread that waits in `work`. Any thread may call."""
        if self._beside is not None:
            self._beside.close()
        self._post(lambda: None)

    def _post(self, do: Callable[[], None], has_to_wait: Callable[[], bool] | None = None) -> None:
        """Queues a call for the deciding thread."""
        self._calls.put(_Call(do, has_to_wait or _never))

    def _do(self, call: _Call) -> None:
        if call.has_to_wait():
            self._held.append(call)
        else:
            call.do()

    def _advance(self) -> bool:
        """Does the next piece of work that is ready. Returns False if nothing was ready."""
        if not self._dispatcher.is_computing:
            self._sessions.expire()
            # A new list first: a call may hold back further calls.
            held = self._held
            self._held = []
            for call in held:
                call.do()
        return not self._held and self._dispatcher.advance()  # nothing new begins before a held call

    def _is_busy(self) -> bool:
        """Returns True while an exclusive call has to wait, for workers or for an earlier exclusive call."""
        return bool(self._held) or self._dispatcher.is_computing

    def _serve(self, packet: Packet, done: Done) -> None:
        """Shows a packet to the observers, and passes the packet to the dispatcher or to a session."""
        if self._observers:
            done = self._observed(packet, done)
            # An observer is the user's code. Its error must not end the thread that serves all clients.
            refusal = outcome(lambda: self._show_before(packet))
            if isinstance(refusal, Exception):
                done(refusal)
                return
        if packet.key.session:
            done(outcome(lambda: self._sessions.serve(packet)))
        else:
            self._dispatcher.submit(packet, done)

    def _observed(self, packet: Packet, done: Done) -> Done:
        """Returns a function that shows an answer to the observers, and then passes the answer on."""

        def show(answer: Answer) -> None:
            failure = outcome(lambda: self._show_after(packet, answer))
            done(failure if isinstance(failure, Exception) else answer)

        return show

    def _show_before(self, packet: Packet) -> None:
        for observer in self._observers:
            observer.before(packet)

    def _show_after(self, packet: Packet, answer: Answer) -> None:
        for observer in self._observers:
            observer.after(packet, answer)

    def _carry_out(self, message: port.Control[Any]) -> Any:
        """Carries out a control message, and returns the reply."""
        adapters = self.server.adapters
        match message:
            case port.BeginGroup(clients):
                return self._dispatcher.begin(clients)
            case port.Leave(client):
                return self._leave(client)
            case port.EndRound(finished):
                return self._dispatcher.end_round(finished)
            case port.AssignCopies(starts):
                return adapters.assign(starts)
            case port.AssignAgain(client, start):
                return adapters.assign_again(client, start)
            case port.ReadCopies(clients):
                return adapters.copies(clients)
            case port.ReadAdapter():
                return adapters.read()
            case port.WriteAdapter(tensors, personal):
                return adapters.write(tensors, personal)
            case port.Fold(changes):
                return self._fold(changes)
            case port.Unfold():
                return self._unfold()
            case port.Commit():
                return self.server.commit()
            case port.ReadMoments():
                return self.server.moments()
            case port.Restore(tensors, moments):
                return self.server.restore(tensors, moments)
            case port.MeasureStep():
                return self.server.measure_step()
            case port.TakeTrace():
                return self.server.take_trace()
            case port.ReadStatus():
                return self._status()
        raise TypeError(f"a trunk knows no message {type(message).__name__}")

    def _leave(self, client: int) -> None:
        self._dispatcher.leave(client)
        self._sessions.leave(client)

    def _fold(self, changes: Mapping[str, LowRank]) -> None:
        self.server.fold(changes)
        self._sessions.leave()  # the caches of open sessions were computed with the former weights

    def _unfold(self) -> None:
        self.server.unfold()
        self._sessions.leave()

    def _status(self) -> TrunkStatus:
        return TrunkStatus(
            incarnation=self.server.steps.incarnation,
            traffic=self.server.traffic.copy(),
            resident_memory=resident_memory(),
            peak_memory=peak_memory(),
            pending=len(self.server.steps),
            sessions=len(self._sessions),
            parameters=self.server.count(),
            least_memory=self._least_memory,
            process=f"{socket.gethostname()}:{os.getpid()}",
        )


Lead = Callable[[Config, Path | None], tuple[Trunk, Blocks]]
"""Returns a part with adapters, whose base weights may be missing, and what computes.

The arguments are the settings of the run, and the folder of a finished run's adapter or None.
"""


def _never() -> bool:
    return False


def _load_part(config: Config, adapter: Path | None) -> Trunk:
    """Returns the trunk's blocks with a new adapter, or with the adapter of a finished run."""
    (part,) = run_adapters.bare_parts(config, ["trunk"])
    if adapter is None:
        run_adapters.adapt(part, config)
    else:
        run_adapters.adopt(adapter, config, part)
    return part


def _first_join(config: Config) -> Join | None:
    """Returns the way to the adapter of all replicas for the first replica; None if replicas train their own."""
    trunk = config.trunk
    if trunk.sync != "step" or trunk.replicas == 1:
        return None
    return first_of(trunk.replicas, None if config.deterministic else trunk.deadline)


def load_service(
    config: Config,
    run: str,
    incarnation: str,
    *,
    threads: int = 1,
    workers: int = 1,
    adapter: Path | None = None,
    memory: int | None = None,
    stage: StageMaker | None = None,
    observers: Sequence[Observer] = (),
    clock: Clock = time.monotonic,
    span: Span | None = None,
    join: Join | None = None,
    lead: Lead | None = None,
) -> TrunkService:
    """Loads the trunk's blocks with an adapter. Blocks of bottom and top are not read.

    Args:
        config: Configuration of the run.
        run: Name of the run. Packets must carry the same name.
        incarnation: Identity of this start of the trunk. Packets must carry the same identity.
        threads: Threads that torch may use in each worker.
        workers: 2 to compute a forward and a backward at the same time.
        adapter: Folder of a finished run's adapter, for the layers of the trunk; None for a new adapter.
        memory: Budget of resident memory in bytes; None for no limit.
        stage: Maker of the strategy's gradient stage for a client's copy; None for a strategy without a stage.
        observers: Observers of packets and answers.
        clock: Clock for leases and deadlines.
        span: Blocks of one stage of the trunk; None for all blocks. Blocks of further stages are not read.
        join: Way of a replica to the adapter of all replicas, under `--trunk.sync step`; None for the first replica.
        lead: Makes the blocks of a trunk that several processes share; None for a trunk in this process alone.
    """
    span = span or Span(*config.bounds)
    blocks = None
    if lead is None:
        part = _load_part(span.config(config), adapter)
    else:
        part, blocks = lead(config, adapter)
    # Under a shared adapter, the strategy does not aggregate the trunk, so its stage has no place there.
    is_personal = SCHEDULES[config.trunk.schedule].personal
    server = TrunkServer(
        part,
        span.codec(config.wire, config.seed),
        config.trunk.schedule,
        config.train,
        config.seed,
        run=run,
        incarnation=incarnation,
        lease=config.trunk.lease,
        budget=Budget(memory),
        clock=clock,
        stage=stage if is_personal else None,
        clients=config.clients,
        rounds=config.rounds,
        has_predecessor=not span.is_first,
        has_successor=not span.is_last,
        join=join or _first_join(config),
        blocks=blocks,
    )
    if config.network.profile:
        server.answers.trace = Trace()
    least = 0
    if memory is not None:
        longest = config.train.max_length + config.prompt.virtual
        least = server.calibrate(config.train.batch_size, longest)
    return TrunkService(
        server,
        config.trunk,
        threads=threads,
        workers=workers,
        least_memory=least,
        observers=observers,
        clock=clock,
    )
