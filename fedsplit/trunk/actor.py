"""The trunk in a process of its own: a Ray actor, and the handle that clients call."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import secrets
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor

from fedsplit.adaptation import adapting
from fedsplit.allowed import SettingError
from fedsplit.config import Config
from fedsplit.lowrank import LowRank
from fedsplit.optimization.own_stage import stage_maker
from fedsplit.trunk.cluster import NAMESPACE, send_tensors_as_arrays
from fedsplit.trunk.dispatch import Answer, Dispatcher
from fedsplit.trunk.lanes import BACKWARD, FORWARD, Lanes
from fedsplit.trunk.learners import Copy, Start
from fedsplit.trunk.memory import Budget, peak_memory, resident_memory
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.trunk.server import TrunkServer
from fedsplit.trunk.sessions import Sessions
from fedsplit.updates import Adapters
from fedsplit.wire import sockets
from fedsplit.wire.codecs import make_codec
from fedsplit.wire.packets import MalformedPacket, Packet, check_form
from fedsplit.wire.steps import SpoiledStep

_AT_ONCE = 4096
"""Calls that may wait in the actor at the same time."""

_ATTEMPTS = 5
"""How often a call is repeated when its answer was lost on the way."""


_Waits = Callable[[], bool]
"""Whether a call has to wait, as things are, for what is under way in a lane."""


def _never() -> bool:
    return False


class TrunkLost(Exception):
    """The trunk's process is gone, or never came up."""


class TrunkActor:
    """A `Dispatcher` in front of a `TrunkServer`, and what only their process can tell.

    Ray's event loop takes the calls; one thread of its own decides what comes next, so that a call may wait for others
    without holding them up, and computes; with two lanes, a thread computes forwards and another one backwards.
    Packets of clients on this machine come over a socket.
    """

    def __init__(self, config: Config, run: str, threads: int, lanes: int = 1, adapter: Path | None = None) -> None:
        """Loads the trunk's blocks, and no others, and puts an adapter on them: a new one, or a finished run's."""
        torch.set_num_threads(threads)
        send_tensors_as_arrays()
        (part,) = adapting.bare_parts(config, ["trunk"])
        if adapter is None:
            adapting.adapt(part, config)
        else:
            adapting.adopt(adapter, config, part)
        budget = Budget(config.trunk.memory_bytes)
        self._incarnation = secrets.token_hex(8)
        server = TrunkServer(
            part,
            make_codec(config.wire.codec),
            config.trunk.schedule,
            config.train,
            config.seed,
            run=run,
            incarnation=self._incarnation,
            lease=config.trunk.lease,
            budget=budget,
            stage=stage_maker(config) if SCHEDULES[config.trunk.schedule].personal else None,
        )
        self._least = 0
        if budget.limit is not None:
            self._least = server.calibrate(config.train.batch_size, config.train.max_length + config.prompt.virtual)
        self._calls: queue.SimpleQueue[tuple[Callable[[], None], _Waits]] = queue.SimpleQueue()
        self._held: list[Callable[[], None]] = []
        beside = Lanes([FORWARD, BACKWARD], threads, self._post) if lanes > 1 else None
        self._dispatcher = Dispatcher(server, config.trunk, lanes=beside)
        self._sessions = Sessions(server, make_codec(config.wire.codec), config.trunk.lease)
        self._socket: sockets.PacketServer | None = None
        with contextlib.suppress(OSError):  # where such sockets are forbidden, packets come by Ray
            self._socket = sockets.PacketServer(self._take) if sockets.is_possible() else None
        threading.Thread(target=self._compute, args=(threads,), daemon=True).start()

    def _compute(self, threads: int) -> None:
        torch.set_num_threads(threads)  # OpenMP keeps the number for each thread that asks
        try:
            while True:
                self._go_on()
        finally:  # a defect: better a trunk that is seen to be gone than one that never answers again
            traceback.print_exc()
            os._exit(1)

    def _post(self, call: Callable[[], None], waits: _Waits = _never) -> None:
        """Has a call made by the thread that decides.

        One that has to wait is made when nothing is under way in any lane, and nothing new is begun before it.
        """
        self._calls.put((call, waits))

    def _go_on(self) -> None:
        """Waits for a call, a deadline or a lease, and does all that can be done then."""
        wakes = min(filter(None, (self._dispatcher.wakes_at(), self._sessions.next_expiry())), default=None)
        if self._dispatcher.is_computing:  # whatever is due waits for a lane, which will call
            wakes = None
        with contextlib.suppress(queue.Empty):
            self._call(*self._calls.get(timeout=None if wakes is None else max(0.0, wakes - time.monotonic())))
        self._take_calls()
        while self._advance():
            self._take_calls()

    def _advance(self) -> bool:
        """One thing more that can be done now; returns whether there was any."""
        if not self._dispatcher.is_computing:
            self._sessions.expire()
            held, self._held = self._held, []
            for call in held:
                call()
        return not self._held and self._dispatcher.advance()

    def _take_calls(self) -> None:
        while not self._calls.empty():
            self._call(*self._calls.get())

    def _call(self, call: Callable[[], None], waits: _Waits) -> None:
        if waits():
            self._held.append(call)
        else:
            call()

    def _computes(self) -> bool:
        """Whether a call that must be alone has to wait: for the lanes, or behind another one."""
        return bool(self._held) or self._dispatcher.is_computing

    async def _alone(self, call: Callable[..., Any], *args: Any) -> Any:
        """Has a call made by the thread that decides, between two steps."""
        return await self._decided(self._computes, call, *args)

    async def _decided(self, waits: _Waits, call: Callable[..., Any], *args: Any) -> Any:
        """Has a call made as by `_post`, and returns what it does."""
        loop, future = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

        def make() -> None:
            try:
                result = call(*args)
            except Exception as error:  # noqa: BLE001  # it is the caller's to know
                loop.call_soon_threadsafe(future.set_exception, error)
            else:
                loop.call_soon_threadsafe(future.set_result, result)

        self._post(make, waits)
        return await future

    def _take(self, packet: Packet, done: Callable[[Answer], None]) -> None:
        """Takes a packet, for the thread that decides.

        What belongs to a session goes to `Sessions`, between two steps. What is no packet in form is refused here:
        an error in the thread that decides would end the process.
        """
        try:
            check_form(packet)
        except MalformedPacket as error:
            done(SpoiledStep(str(error)))
            return

        def serve() -> None:
            if not packet.key.session:
                self._dispatcher.submit(packet, done)
                return
            try:
                answer: Answer = self._sessions.serve(packet)
            except Exception as error:  # noqa: BLE001  # it is the caller's to know
                answer = error
            done(answer)

        self._post(serve, self._computes if packet.key.session else _never)

    async def address(self) -> sockets.Address | None:
        """Where packets may be sent to without Ray, by processes of this machine."""
        return self._socket.address if self._socket else None

    async def serve(self, packet: Packet) -> Packet:
        """Hidden states or a gradient up, and down what `TrunkServer` makes of them, when it is their turn."""
        loop, future = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

        def done(answer: Answer) -> None:
            settle: Callable[[Any], None] = future.set_result if isinstance(answer, Packet) else future.set_exception
            loop.call_soon_threadsafe(settle, answer)

        self._take(packet, done)
        answer: Packet = await future
        return answer

    async def begin(self, group: Sequence[int]) -> None:
        """As `Dispatcher.begin`."""
        await self._alone(self._dispatcher.begin, group)

    async def leave(self, client: int) -> None:
        """As `Dispatcher.leave`; the client's sessions end, too. What is computed for others goes on."""

        def leave() -> None:
            self._dispatcher.leave(client)
            self._sessions.leave(client)

        await self._decided(lambda: self._dispatcher.computes_for(client), leave)

    async def end_round(self, finished: Sequence[int]) -> dict[str, int]:
        """As `Dispatcher.end_round`."""
        ended: dict[str, int] = await self._alone(self._dispatcher.end_round, finished)
        return ended

    async def learners(self, method: str, *args: Any) -> Any:
        """Calls a method of `Learners`, between two steps: see the handle for which there are."""
        return await self._alone(getattr(self._dispatcher.server.learners, method), *args)

    async def fold(self, changes: Mapping[str, LowRank]) -> None:
        """As `TrunkServer.fold`; all sessions end, since what they remember was computed with other weights."""
        await self._alone(self._dispatcher.server.fold, changes)
        await self._alone(self._sessions.leave)

    async def status(self) -> dict[str, Any]:
        """What the process can tell: see the keys below; bytes, and counts of parameters.

        `least_memory` is the smallest `--trunk.memory` that suffices, 0 where none was given.
        """

        def look() -> dict[str, Any]:
            server = self._dispatcher.server
            return {
                "incarnation": self._incarnation,
                "least_memory": self._least,
                "traffic": dict(server.traffic),
                "resident_memory": resident_memory(),
                "peak_memory": peak_memory(),
                "pending": len(server.steps),
                "sessions": len(self._sessions),
                "over_socket": self._socket.taken if self._socket else 0,
                "parameters": server.count(),
            }

        found: dict[str, Any] = await self._alone(look)
        return found


class TrunkHandle:
    """A trunk elsewhere, called as if it were here.

    A trunk that is gone raises `TrunkLost`; what the trunk itself raises is raised here. A call whose answer
    was lost is repeated: the trunk counts every step once.

    Packets go over a socket where the trunk is on this machine, and else through Ray. Where the connection breaks,
    those without an answer are repeated through Ray, which tells what is wrong.
    """

    def __init__(self, actor: Any, timeout: float | None = None) -> None:
        """Wraps Ray's handle of the actor.

        Args:
            actor: The handle.
            timeout: Seconds after which a trunk that does not answer counts as dead; None waits for ever, as a client
                does, whose packet may have to wait for those of others.
        """
        self._actor, self._timeout = actor, timeout
        self._asked = False
        self._socket: sockets.PacketClient | None = None

    def _begin(self, method: str, *args: Any) -> Callable[[], Any]:
        try:
            answer = getattr(self._actor, method).remote(*args)
        except ray.exceptions.RayActorError as error:
            raise _lost(error) from error
        return lambda: self._wait(answer, method, *args)

    def _wait(self, answer: Any, method: str, *args: Any) -> Any:
        for attempt in range(_ATTEMPTS):
            try:
                return ray.get(answer, timeout=self._timeout)
            except ray.exceptions.GetTimeoutError as error:
                raise TrunkLost(f"the trunk's process has not answered for {self._timeout:g} seconds") from error
            except ray.exceptions.ActorUnavailableError as error:
                if attempt == _ATTEMPTS - 1:
                    raise _lost(error) from error
                time.sleep(2**attempt / 10)
                answer = getattr(self._actor, method).remote(*args)
            except ray.exceptions.RayActorError as error:
                raise _lost(error) from error
        return None

    def _connect(self) -> sockets.PacketClient | None:
        """The socket to the trunk, where there is one."""
        if not self._asked:
            self._asked = True
            with contextlib.suppress(OSError):  # the trunk is on another machine
                address = self._begin("address")()
                self._socket = sockets.PacketClient(address) if address and sockets.is_possible() else None
        return self._socket if self._socket and self._socket.is_open else None

    def send(self, packet: Packet) -> Callable[[], Packet]:
        """As `TrunkActor.serve`; what is returned waits for the answer."""
        if (connection := self._connect()) is None:
            return self._begin("serve", packet)
        try:
            answer = connection.send(packet)
        except sockets.Unanswered:
            return self._begin("serve", packet)

        def wait() -> Packet:
            try:
                return answer()
            except sockets.Unanswered:
                again: Packet = self._begin("serve", packet)()
                return again

        return wait

    def begin(self, group: Sequence[int]) -> None:
        """As `Dispatcher.begin`."""
        self._begin("begin", list(group))()

    def leave(self, client: int) -> None:
        """As `Dispatcher.leave`."""
        if self._socket:
            self._socket.forget()
        self._begin("leave", client)()

    def end_round(self, finished: Sequence[int]) -> dict[str, int]:
        """As `Dispatcher.end_round`."""
        ended: dict[str, int] = self._begin("end_round", list(finished))()
        return ended

    def assign(self, starts: Mapping[int, Start]) -> None:
        """As `Learners.assign`."""
        self._begin("learners", "assign", dict(starts))()

    def copies(self) -> dict[int, Copy]:
        """As `Learners.copies`."""
        copies: dict[int, Copy] = self._begin("learners", "copies")()
        return copies

    def read(self) -> Adapters:
        """As `Learners.read`."""
        adapter: Adapters = self._begin("learners", "read")()
        return adapter

    def write(self, tensors: Mapping[str, Tensor], own: Mapping[int, Mapping[str, Tensor]] | None = None) -> None:
        """As `Learners.write`."""
        self._begin("learners", "write", dict(tensors), dict(own or {}))()

    def fold(self, changes: Mapping[str, LowRank]) -> None:
        """As `TrunkServer.fold`."""
        self._begin("fold", dict(changes))()

    def moments(self) -> dict[str, Tensor]:
        """As `Learners.moments`."""
        moments: dict[str, Tensor] = self._begin("learners", "moments")()
        return moments

    def restore(self, tensors: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """As `Learners.restore`."""
        self._begin("learners", "restore", dict(tensors), dict(moments))()

    def status(self) -> dict[str, Any]:
        """As `TrunkActor.status`."""
        found: dict[str, Any] = self._begin("status")()
        return found


def _lost(error: Exception) -> TrunkLost:
    return TrunkLost(f"the trunk's process is gone ({str(error).strip().splitlines()[0]})")


def start_trunk(config: Config, name: str, threads: int, lanes: int = 1, adapter: Path | None = None) -> TrunkHandle:
    """Starts the trunk's actor; it loads while the caller goes on.

    It asks for no CPU: Flower counts all CPUs of a node as its own, and would wait for ever for one that
    the trunk has.

    Args:
        config: The run's configuration.
        name: What clients find it by; also the run's name, which their steps carry.
        threads: Of each of its lanes.
        lanes: 2 where a forward and a backward are computed at the same time.
        adapter: The folder of a finished run's adapter, of which it takes its own layers.
    """
    remote = ray.remote(num_cpus=0)(TrunkActor).options(name=name, max_concurrency=_AT_ONCE)
    return TrunkHandle(remote.remote(config, name, threads, lanes, adapter), config.timeout)


def find_trunk(name: str) -> TrunkHandle:
    """The trunk of that name, from any process of the cluster.

    Raises:
        TrunkLost: There is none.
    """
    try:
        return TrunkHandle(ray.get_actor(name, namespace=NAMESPACE))
    except ValueError as error:
        raise TrunkLost(f"there is no trunk named {name}") from error


def check_memory(config: Config, trunk: TrunkHandle) -> None:
    """Makes sure that the memory given to the trunk suffices; only the trunk, once it is loaded, can tell.

    Raises:
        SettingError: It does not suffice for a single step.
    """
    limit = config.trunk.memory_bytes
    if limit is not None and (least := trunk.status()["least_memory"]) > limit:
        words = f"at least {-(-least // 10**6)}MB, for this trunk and one step at a time"
        raise SettingError("trunk.memory", config.trunk.memory, words)
