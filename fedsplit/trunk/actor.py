"""The trunk as a Ray actor: the actor with the service, and the port by which clients call the actor."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
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
from fedsplit.trunk.relay import Relay, Submit
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.trunk.service import load_service
from fedsplit.trunk.shard_actors import ActorShards
from fedsplit.trunk.spans import Span
from fedsplit.trunk.status import TrunkStatus
from fedsplit.trunk.step_sync import Newest, Share
from fedsplit.trunk.workers import run_until_defect
from fedsplit.wire import sockets
from fedsplit.wire.packets import Packet
from fedsplit.wire.socket_server import PacketServer
from fedsplit.wire.streams import PacketStream, client_of
from fedsplit.wire.tls import NotTrusted
from fedsplit.wire.transport import FallbackTransport, PacketTransport, PendingAnswer, TrunkLost

_AT_ONCE = 4096
"""Calls that may wait in the actor at the same time. A packet of a gathering schedule waits for all other clients'."""

_ATTEMPTS = 5
"""Number of times that a call is made in all if answers are lost on the way."""


@dataclass(frozen=True)
class Seat:
    """Place of one actor among the actors of a run's trunk.

    Attributes:
        name: Name of the actor.
        run: Name of the run, which packets must carry.
        incarnation: Identity of this start of the trunk, the same for all actors.
        span: Blocks of the actor; None for all blocks of the trunk.
        rest: Name of the actor with the next stage; empty for the last stage.
        replica: Number of the replica.
        master: Name of the actor with the adapter of all replicas; empty for the first replica, and if replicas train
            their own adapters.
    """

    name: str
    run: str
    incarnation: str
    span: Span | None = None
    rest: str = ""
    replica: int = 0
    master: str = ""


@dataclass(frozen=True)
class ActorSetup:
    """Facts that all actors of a run's trunk are started with, beside the settings.

    Attributes:
        threads: Threads that torch may use in each worker.
        workers: 2 to compute a forward and a backward at the same time.
        adapter: Folder of a finished run's adapter. Each actor reads the layers of its blocks.
        has_stage: True if the strategy has a gradient stage. The trunk loads the strategy by name.
        is_reached_from_afar: True if clients on other machines send packets over TCP. Their token comes through Ray.
    """

    threads: int
    workers: int = 1
    adapter: Path | None = None
    has_stage: bool = False
    is_reached_from_afar: bool = False


class TrunkActor:
    """A `TrunkService` in the process of a Ray actor.

    Ray's event loop takes calls, and a socket takes packets from clients on this machine. Both pass packets to the
    service, or to the relay of a stage. The service works in a separate thread, so that a waiting call does not block
    later calls.
    """

    def __init__(
        self,
        config: Config,
        seat: Seat,
        setup: ActorSetup,
        further: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Loads the trunk and starts its thread.

        Args:
            config: Configuration of the run.
            seat: Place among the actors of the run's trunk.
            setup: Threads, workers and further facts.
            further: Options of the further actors that share the trunk's blocks.
        """
        torch.set_num_threads(setup.threads)
        send_tensors_as_arrays()
        self._service = load_service(
            config,
            seat.run,
            seat.incarnation,
            threads=setup.threads,
            workers=setup.workers,
            adapter=setup.adapter,
            memory=config.trunk.memory_bytes,
            stage=stage_maker(config) if setup.has_stage else None,
            span=seat.span,
            join=(lambda make: (RayPeers(seat.master, seat.replica), None)) if seat.master else None,
            lead=ActorShards(further, setup.threads).lead if further else None,
        )
        self._asking = ThreadPoolExecutor(2 * config.trunk.replicas, "replica")  # a step waits for the other replicas
        self._submit: Submit = self._service.submit
        if seat.rest:
            learns = SCHEDULES[config.trunk.schedule].learns
            connect = functools.partial(_connected, seat.rest)
            self._submit = Relay(self._service.submit, connect, learns).submit
        self._socket: PacketServer | None = None
        host = ray.util.get_node_ip_address() if setup.is_reached_from_afar else ""
        tls = config.wire.tls if host else ""
        if host or sockets.is_possible():
            # A sandbox may forbid sockets; packets then come through Ray, unless they must be encrypted.
            with contextlib.suppress(*() if tls else (OSError,)):
                self._socket = PacketServer(self._submit, host, tls)
        arguments = (self._service.work, setup.threads)
        working = threading.Thread(target=run_until_defect, args=arguments, daemon=True)
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
        answer: Packet = await _settled(lambda done: self._submit(packet, done))
        return answer

    async def control(self, message: Control[Reply]) -> Reply:
        """Carries out a control message."""
        reply: Any = await _settled(lambda done: self._service.request(message, done))
        if isinstance(reply, TrunkStatus) and self._socket:
            # The service itself knows nothing of sockets.
            reply = replace(reply, over_socket=self._socket.taken)
        return reply

    async def ask_master(self, question: str, *arguments: Any) -> Any:
        """Asks the adapter of all replicas, which lives here. The question is a method of `Master`."""
        master = self._service.server.adapters.master
        loop = asyncio.get_running_loop()
        # The master blocks until other replicas have come, and the event loop must take their packets meanwhile.
        return await loop.run_in_executor(self._asking, functools.partial(getattr(master, question), *arguments))


class RayPeers:
    """The way of a replica to the master in another actor; see `fedsplit.trunk.step_sync.Peers`."""

    def __init__(self, actor: str, replica: int) -> None:
        """Takes the name of the actor with the master, and the number of the replica."""
        self._name = actor
        self._replica = replica
        self._actor: ActorHandle | None = None

    def _ask(self, question: str, *arguments: Any) -> Any:
        if self._actor is None:
            self._actor = ray.get_actor(self._name, namespace=NAMESPACE)
        return ray.get(self._actor.ask_master.remote(question, *arguments))

    def enter(self) -> None:
        """See `Peers.enter`."""
        self._ask("enter", self._replica)

    def leave(self) -> None:
        """See `Peers.leave`."""
        self._ask("leave", self._replica)

    def step(self, share: Share) -> Newest:
        """See `Peers.step`."""
        newest: Newest = self._ask("step", self._replica, share)
        return newest

    def close(self, share: Share) -> Newest:
        """See `Peers.close`."""
        newest: Newest = self._ask("close", self._replica, share)
        return newest

    def newest(self, version: int) -> Newest | None:
        """See `Peers.newest`."""
        newest: Newest | None = self._ask("newest", version)
        return newest


def _connected(name: str) -> PacketStream:
    """Returns a new connection to the actor with the next stage.

    Raises:
        OSError: The actor is gone or not trusted, or has no socket.
    """
    try:
        return PacketStream(_address_of(name))
    except (ValueError, NotTrusted, ray.exceptions.RayError) as error:
        raise ConnectionError(first_line(error)) from error


@functools.cache  # an actor has one address, and a lost one is not started again
def _address_of(name: str) -> sockets.Address:
    """Returns the address of an actor of this run."""
    actor = ray.get_actor(name, namespace=NAMESPACE)
    address: sockets.Address | None = ray.get(actor.address.remote())
    if address is None:
        raise ConnectionError("stages of a trunk need sockets, which this system does not allow")
    return address


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
        # Not reached: the last attempt returns or raises.
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

    Packets go over a socket. Through Ray they go where no socket is possible, and again if a connection breaks: Ray's
    error then names the cause. With TLS they never go through Ray, which may not encrypt them.
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
        """Returns the transport of packets: a socket with Ray or another socket to fall back on, or Ray alone.

        Raises:
            TrunkLost: The trunk is gone.
            NotTrusted: There is TLS, and one side does not accept the certificate of the other.
        """
        if self._transport is None:
            address: sockets.Address | None = self._calls.begin("address")()
            self._transport = self._way_to(address)
        return self._transport

    def _way_to(self, address: sockets.Address | None) -> PacketTransport:
        through_ray = RayTransport(self._calls)
        if address is None:
            return through_ray
        try:
            first = client_of(address)
        except OSError as error:  # the trunk is on another machine, which cannot be reached
            if address.tls:
                raise TrunkLost(f"the trunk cannot be reached ({first_line(error)})") from error
            return through_ray
        return FallbackTransport(first, sockets.Reconnection(address) if address.tls else through_ray)

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
    seat: Seat,
    setup: ActorSetup,
    options: Sequence[Mapping[str, Any]] | None = None,
) -> RayTrunk:
    """Starts an actor of a trunk. The actor loads its blocks while the caller goes on.

    Args:
        config: Configuration of the run.
        seat: Name of the actor, by which clients find the trunk, and its blocks.
        setup: Threads, workers and further facts.
        options: Options of the Ray actor, and of each further actor that shares the trunk's blocks: the resources that
            Ray keeps, and the place. None for no resources.
    """
    # No CPUs: those of the local Ray are dealt out to the processes of clients.
    of_actor, *further = options or [{"num_cpus": 0}] * config.trunk.tensor_parallel
    named = {"name": seat.name, "namespace": NAMESPACE, "max_concurrency": _AT_ONCE}
    actor_class = ray.remote(TrunkActor).options(**named, **of_actor)
    actor = actor_class.remote(config, seat, setup, further)
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
