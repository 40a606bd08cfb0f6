"""The trunk as a Ray actor: the actor with the service, and the port by which clients call the actor."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray.actor import ActorHandle

from fedsplit.errors import first_line
from fedsplit.optimization.own_stage import stage_maker
from fedsplit.settings.config import Config
from fedsplit.trunk.cluster import NAMESPACE, send_tensors_as_arrays
from fedsplit.trunk.port import Control, Leave, Reply, TrunkPort
from fedsplit.trunk.service import load_service
from fedsplit.trunk.status import TrunkStatus
from fedsplit.trunk.workers import run_until_defect
from fedsplit.wire import sockets
from fedsplit.wire.packets import Packet
from fedsplit.wire.transport import FallbackTransport, PacketTransport, PendingAnswer, TrunkLost

_AT_ONCE = 4096
"""Calls that may wait in the actor at the same time. A packet of a gathering schedule waits for all other clients'."""

_ATTEMPTS = 5
"""Number of times that a call is made in all if answers are lost on the way."""


class TrunkActor:
    """A `TrunkService` in the process of a Ray actor.

    Ray's event loop takes calls, and a socket takes packets from clients on this machine. Both pass packets to the
    service. The service works in a separate thread, so that a waiting call does not block later calls.
    """

    def __init__(
        self,
        config: Config,
        run: str,
        threads: int,
        workers: int = 1,
        adapter: Path | None = None,
        has_stage: bool = False,
        is_reached_from_afar: bool = False,
    ) -> None:
        """Loads the trunk and starts its thread; see `start_trunk` for the arguments."""
        torch.set_num_threads(threads)
        send_tensors_as_arrays()
        self._service = load_service(
            config,
            run,
            secrets.token_hex(8),
            threads=threads,
            workers=workers,
            adapter=adapter,
            memory=config.trunk.memory_bytes,
            stage=stage_maker(config) if has_stage else None,
        )
        self._socket: sockets.PacketServer | None = None
        host = ray.util.get_node_ip_address() if is_reached_from_afar else ""
        if host or sockets.is_possible():
            with contextlib.suppress(OSError):  # a sandbox may forbid sockets; packets then come through Ray
                self._socket = sockets.PacketServer(self._service.submit, host)
        working = threading.Thread(target=run_until_defect, args=(self._service.work, threads), daemon=True)
        working.start()

    async def node(self) -> str:
        """Returns Ray's id of the node of this process."""
        node: str = ray.get_runtime_context().get_node_id()
        return node

    async def address(self) -> sockets.Address | None:
        """Returns the address for packets. None where sockets are not possible."""
        return self._socket.address if self._socket else None

    async def serve(self, packet: Packet) -> Packet:
        """Serves a packet."""
        answer: Packet = await _settled(lambda done: self._service.submit(packet, done))
        return answer

    async def control(self, message: Control[Reply]) -> Reply:
        """Carries out a control message."""
        reply: Any = await _settled(lambda done: self._service.request(message, done))
        if isinstance(reply, TrunkStatus) and self._socket:
            reply = replace(reply, over_socket=self._socket.taken)
        return reply


async def _settled(begin: Callable[[Callable[[Any], None]], None]) -> Any:
    """Waits in an event loop for a result from a second thread.

    Args:
        begin: Called with a function that takes the result, or an exception to raise.
    """
    loop = asyncio.get_running_loop()
    future = loop.create_future()

    # The service's thread calls `done`, but only the thread of the event loop may touch the future.
    def done(result: Any) -> None:
        settle = future.set_exception if isinstance(result, Exception) else future.set_result
        loop.call_soon_threadsafe(settle, result)

    begin(done)
    return await future


class _Calls:
    """Calls of an actor's methods.

    A call with a lost answer is repeated. The repetition is harmless, since the trunk counts every step once.
    """

    def __init__(self, actor: ActorHandle, timeout: float | None) -> None:
        """Calls an actor; `timeout` is in seconds, None waits for ever."""
        self._actor = actor
        self._timeout = timeout

    def begin(self, method: str, *args: Any) -> Callable[[], Any]:
        """Calls a method, and returns a function that waits for the result.

        Raises:
            TrunkLost: The actor is gone. The returned function raises the error if the actor ends later.
        """
        try:
            answer = getattr(self._actor, method).remote(*args)
        except ray.exceptions.RayActorError as error:
            raise _lost(error) from error
        return lambda: self._wait(answer, method, *args)

    def kill(self) -> None:
        """Ends the actor's process. Does nothing if the process is gone already."""
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(self._actor, no_restart=True)

    def _wait(self, answer: ray.ObjectRef, method: str, *args: Any) -> Any:
        """Waits for the result of a call, and repeats the call while the actor cannot be reached."""
        for attempt in range(_ATTEMPTS):
            try:
                return ray.get(answer, timeout=self._timeout)
            except ray.exceptions.GetTimeoutError as error:
                raise TrunkLost(f"the trunk's process has not answered for {self._timeout:g} seconds") from error
            except ray.exceptions.ActorUnavailableError as error:
                if attempt == _ATTEMPTS - 1:
                    raise _lost(error) from error
                time.sleep(2**attempt / 10)  # 0.1 to 0.8 seconds: a connection that was cut comes back meanwhile
                answer = getattr(self._actor, method).remote(*args)
            except ray.exceptions.RayActorError as error:
                raise _lost(error) from error
        return None


def _lost(error: Exception) -> TrunkLost:
    return TrunkLost(f"the trunk's process is gone ({first_line(error)})")


class RayTransport:
    """Sends packets as calls of an actor, between machines or without a socket."""

    def __init__(self, calls: _Calls) -> None:
        """Sends packets by the calls of an actor."""
        self._calls = calls

    def send(self, packet: Packet) -> PendingAnswer:
        """Sends a packet, as `PacketTransport.send` does."""
        return self._calls.begin("serve", packet)

    def forget(self) -> None:
        """Does nothing, since Ray drops an answer when nobody waits for the answer."""


class RayTrunk(TrunkPort):
    """A trunk in a Ray actor, called like a local trunk.

    Packets go over a socket to a trunk on this machine, and through Ray to any other machine. After a broken
    connection, unanswered packets are repeated through Ray. Ray's error then names the cause.
    """

    def __init__(
        self, actor: ActorHandle, timeout: float | None = None, transport: PacketTransport | None = None
    ) -> None:
        """Wraps Ray's handle of the actor.

        Args:
            actor: The handle.
            timeout: Seconds after which a silent trunk counts as lost; None waits for ever. Clients must wait for ever,
                since the answer to a packet may depend on packets of slower clients.
            transport: Transport of packets; None chooses at the first packet.
        """
        self._calls = _Calls(actor, timeout)
        self._transport = transport

    def node(self) -> str:
        """Returns Ray's id of the actor's node.

        Raises:
            TrunkLost: The actor is gone.
        """
        node: str = self._calls.begin("node")()
        return node

    def kill(self) -> None:
        """Ends the actor's process. Does nothing if the process is gone already."""
        self._calls.kill()

    def transport(self) -> PacketTransport:
        """Returns the transport of packets: a socket with Ray to fall back on, or Ray alone."""
        if self._transport is None:
            self._transport = through_ray = RayTransport(self._calls)
            with contextlib.suppress(OSError):  # the trunk is on another machine, which cannot be reached
                address = self._calls.begin("address")()
                if address:
                    self._transport = FallbackTransport(sockets.PacketClient(address), through_ray)
        return self._transport

    def send(self, packet: Packet) -> PendingAnswer:
        """Sends a packet, and returns a function that waits for the answer."""
        return self.transport().send(packet)

    def control(self, message: Control[Reply]) -> Reply:
        """Sends a control message, and waits for the reply."""
        if isinstance(message, Leave) and self._transport is not None:
            self._transport.forget()
        reply: Reply = self._calls.begin("control", message)()
        return reply


def start_trunk(
    config: Config,
    name: str,
    threads: int,
    workers: int = 1,
    adapter: Path | None = None,
    has_stage: bool = False,
    options: Mapping[str, Any] | None = None,
    is_reached_from_afar: bool = False,
) -> RayTrunk:
    """Starts the trunk's actor. The actor loads the model while the caller goes on.

    Args:
        config: Configuration of the run.
        name: Name of the run. Clients find the trunk by the name, and steps carry the name.
        threads: Threads that torch may use in each worker.
        workers: 2 to compute a forward and a backward at the same time.
        adapter: Folder of a finished run's adapter. The trunk reads the layers of the trunk's blocks.
        has_stage: True if the strategy has a gradient stage. The trunk loads the strategy by name.
        options: Options of the Ray actor: the resources that Ray keeps, and the place. None for no resources.
        is_reached_from_afar: True if clients on other machines send packets over TCP. Their token comes through Ray.
    """
    kept = {"num_cpus": 0} if options is None else options
    named = {"name": name, "namespace": NAMESPACE, "max_concurrency": _AT_ONCE}
    actor_class = ray.remote(TrunkActor).options(**named, **kept)
    actor = actor_class.remote(config, name, threads, workers, adapter, has_stage, is_reached_from_afar)
    return RayTrunk(actor, config.timeout)


def find_trunk(name: str) -> RayTrunk:
    """Returns the trunk with a name, from any process of the cluster.

    Raises:
        TrunkLost: No actor has the name.
    """
    try:
        return RayTrunk(ray.get_actor(name, namespace=NAMESPACE))
    except ValueError as error:
        raise TrunkLost(f"there is no trunk named {name}") from error
