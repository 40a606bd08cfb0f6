"""The server's side of packets over gRPC: who may open a stream, and how much may be on the way.

The client's side is `fedsplit.wire.grpc_client`. All streams share one event loop, which copies little and never waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from fedsplit.errors import InputError, SettingError, first_line
from fedsplit.wire import frames
from fedsplit.wire.callers import Caller, caller_of
from fedsplit.wire.chunks import Assembler, Refused, blob_reading
from fedsplit.wire.control_requests import ControlRequests, Reply
from fedsplit.wire.event_loop import event_loop, start
from fedsplit.wire.grpc_address import ERROR, LIFE, REQUEST, GrpcAddress, check_encrypted, check_token, entry
from fedsplit.wire.grpc_schema import SERVICE
from fedsplit.wire.grpc_streams import OPTIONS, ChunkStream, beside_the_loop
from fedsplit.wire.identities import Identities
from fedsplit.wire.limits import Admissions, Limits, RateLimit
from fedsplit.wire.outbox import Outbox
from fedsplit.wire.packets import Packet
from fedsplit.wire.tls import CA, CERTIFICATE, KEY, problem
from fedsplit.wire.windows import ReceiveWindow

Done = Callable[[Packet | Exception], None]
"""Takes an answer, or the error in place of an answer, from any thread."""

Serve = Callable[[Packet, Done], None]
"""Takes a packet, and must not wait."""

Control = Callable[[bytes, Callable[[Reply], None]], None]
"""Takes a control request, and must not wait."""

_HEADER_ROOM = 2**17
"""Bytes of a frame beside the arrays, at most."""

_LONGEST_WORDS = 2000
"""Most characters of an error. A status travels in a header, which gRPC limits."""

Handler = Callable[[Any, Caller], Coroutine[Any, Any, None]]


def no_control(request: bytes, done: Callable[[Reply], None]) -> None:
    """Refuses every control request: for servers of packets alone."""
    done(InputError("this server takes packets only"))


class GrpcServer:
    """Takes packets of clients, and control requests of the operator.

    Attributes:
        port: Port of the server.
        taken: Number of packets so far.

    Example:
        >>> from fedsplit.wire.grpc_client import GrpcClient
        >>> from fedsplit.wire.packets import StepKey
        >>> server = GrpcServer(lambda packet, done: done(packet), token=b"secret")  # an echo
        >>> client = GrpcClient(GrpcAddress("127.0.0.1", server.port, token=b"secret"), client=0)
        >>> packet = Packet(StepKey(round=1, client=0, step=0))
        >>> client.send(packet)() == packet
        True
        >>> client.close()
        >>> server.close()
    """

    def __init__(
        self,
        serve: Serve,
        control: Control = no_control,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        identities: Identities | None = None,
        token: bytes,
        limits: Limits | None = None,
    ) -> None:
        """Listens until `close`.

        Args:
            serve: Called with a packet, and a function that takes the answer. Calls come from several threads, one at
                a time for each stream.
            control: Called with a control request, and a function that takes the reply.
            host: IP address or name of this machine at which the server listens.
            port: Port; 0 for any free port.
            identities: Certificates, and the clients that they stand for; None without TLS.
            token: Token of the run, which each caller must send.
            limits: Limits of what a client may take.

        Raises:
            InputError: The certificates cannot be used, or there are none and the host is not on loopback.
            OSError: The port is taken, or the host is not this machine.
        """
        folder = str(identities.folder) if identities else ""
        check_encrypted(host, folder)
        if identities and (reason := problem(identities.folder)):
            raise SettingError("tls", identities.folder, f"a folder with {CA}, {CERTIFICATE} and {KEY} ({reason})")
        if not token:
            raise InputError("a server needs a token")
        self.taken = 0
        self._serve = serve
        self._identities = identities
        self._token = token
        self._limits = limits or Limits()
        self._admissions = Admissions(self._limits)
        self._requests = ControlRequests(control)
        self._rates: dict[object, RateLimit] = {}
        self._life = secrets.token_hex(8)
        self.port = start(self._open(GrpcAddress(host, port))).result()

    async def _open(self, address: GrpcAddress) -> int:
        """Starts to listen. Returns the port."""
        limits = self._limits
        # With gRPC's default, two servers could listen at one port, and would divide the clients by chance.
        options = [*OPTIONS, ("grpc.so_reuseport", 0), ("grpc.max_concurrent_streams", 4 * limits.streams)]
        most = limits.clients * limits.streams + 64  # and health checks
        self._server = grpc.aio.server(options=options, maximum_concurrent_rpcs=most)
        methods = {"Packets": self._handled(self._packets), "Control": self._handled(self._control)}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        try:
            port = self._add_port(address.target)
        except RuntimeError as error:
            raise OSError(f"gRPC cannot listen at {address.target}: {first_line(error)}") from error
        await self._server.start()
        # The empty name stands for the whole server in gRPC's health checks.
        for name in ("", SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return port

    def _add_port(self, target: str) -> int:
        if self._identities is None:
            return self._server.add_insecure_port(target)
        folder = self._identities.folder
        own = ((folder / KEY).read_bytes(), (folder / CERTIFICATE).read_bytes())
        credentials = grpc.ssl_server_credentials([own], (folder / CA).read_bytes(), require_client_auth=True)
        return self._server.add_secure_port(target, credentials)

    def close(self) -> None:
        """Ends all streams, and frees the port."""
        start(self._shut()).result()

    async def _shut(self) -> None:
        await self._health.enter_graceful_shutdown()
        await self._server.stop(None)

    def _handled(self, handler: Handler) -> grpc.RpcMethodHandler:
        """Returns gRPC's record of a method, whose refusals become statuses."""

        async def handle(_: Any, context: Any) -> None:
            try:
                async with self._admitted(context) as caller:
                    await handler(context, caller)
            except Refused as refused:
                await context.abort(grpc.StatusCode[refused.status], str(refused))

        return grpc.stream_stream_rpc_method_handler(handle)

    @contextlib.asynccontextmanager
    async def _admitted(self, context: Any) -> AsyncIterator[Caller]:
        """Finds out who calls, and counts the stream."""
        metadata = context.invocation_metadata()
        check_token(metadata, self._token)
        caller = caller_of(metadata, context.auth_context(), self._identities)
        leave = self._admissions.enter(caller.place)
        try:
            yield caller
        finally:
            leave()

    async def _packets(self, context: Any, caller: Caller) -> None:
        """Serves a stream of packets."""
        caller.check_packets()
        limits = self._limits
        outbox = Outbox(limits.pending)
        largest = limits.largest_packet
        assembler = Assembler(lambda total: frames.reading(min(total, largest)), largest + _HEADER_ROOM)
        window = ReceiveWindow(limits.window)
        stream = ChunkStream(context.read, context.write, assembler, window, limits.pause, outbox.held)
        await stream.greet(limits.pending)
        await stream.welcome()
        await _first_of(self._read(stream, outbox, caller), _answer(stream, outbox), stream.watch())

    async def _read(
        self,
        stream: ChunkStream[tuple[int, Packet | Exception]],
        outbox: Outbox,
        caller: Caller,
    ) -> None:
        """Takes packets until the client has sent the last one, and waits for the answers to all of them."""
        # By client, and not by stream: a second stream brings no further allowance.
        rate = self._rates.setdefault(caller.place, RateLimit(self._limits.rate, time.monotonic))
        while await self._read_one(stream, outbox, caller, rate):
            pass
        await outbox.drained()

    async def _read_one(
        self,
        stream: ChunkStream[tuple[int, Packet | Exception]],
        outbox: Outbox,
        caller: Caller,
        rate: RateLimit,
    ) -> bool:
        """Takes one packet. A loop in here would keep the last packet in memory while the stream is silent."""
        frame = await stream.receive(rate.take)
        if frame is None:
            return False
        number, packet = frame
        if isinstance(packet, Exception):
            raise Refused("INVALID_ARGUMENT", "a client may send packets only")
        caller.check(packet)
        # Before the credit, which depends on the bytes that this side holds.
        ticket = outbox.take(packet.nbytes)
        await stream.give_credit()
        self.taken += 1
        loop = event_loop()

        def done(answer: Packet | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the program ends
                loop.call_soon_threadsafe(outbox.put, ticket, number, answer)

        self._serve(packet, done)
        return True

    async def _control(self, context: Any, caller: Caller) -> None:
        """Carries out one control request."""
        caller.check_control()
        limits = self._limits
        metadata = context.invocation_metadata()
        identity = entry(metadata, REQUEST)
        if not identity:
            raise Refused("INVALID_ARGUMENT", f"the request has no {REQUEST}")
        if entry(metadata, LIFE) not in ("", self._life):
            raise Refused("ABORTED", "the trunk was started again, and does not know the request")
        # Before the request comes, so that an operator who repeats the request can name the life that has got it.
        await context.send_initial_metadata(((LIFE, self._life),))
        assembler = Assembler(blob_reading, limits.largest_control)
        window = ReceiveWindow(limits.window)
        stream = ChunkStream(context.read, context.write, assembler, window, limits.pause)
        await stream.greet()
        await stream.welcome()
        await _first_of(self._converse(stream, context, identity), stream.watch())

    async def _converse(self, stream: ChunkStream[bytes], context: Any, identity: str) -> None:
        """Takes a request, and sends the reply."""
        request = await stream.receive()
        if request is None:
            raise Refused("INVALID_ARGUMENT", "there is no request")
        # Credit, and the confirmation by the end of the stream, come while the request is carried out.
        rest = asyncio.ensure_future(stream.receive())
        try:
            reply = await self._requests.reply(identity, request)
            if isinstance(reply, Exception):
                context.set_trailing_metadata(((ERROR, type(reply).__name__),))
                raise Refused("UNKNOWN", str(reply)[:_LONGEST_WORDS])
            await stream.send([memoryview(reply)])
            if await rest is not None:
                raise Refused("INVALID_ARGUMENT", "a stream carries one control request")
            self._requests.confirm(identity)
        finally:
            rest.cancel()


async def _first_of(*works: Coroutine[Any, Any, None]) -> None:
    """Waits until one of several coroutines ends, and ends the others."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _answer(stream: ChunkStream[Any], outbox: Outbox) -> None:
    """Sends answers for ever."""
    while True:
        await _answer_one(stream, outbox)


async def _answer_one(stream: ChunkStream[Any], outbox: Outbox) -> None:
    """Sends one answer. A loop in here would keep the last answer in memory while there is none to send."""
    ticket, number, answer = await outbox.get()
    size = answer.nbytes if isinstance(answer, Packet) else 0
    # An array that does not lie in one piece is copied.
    await stream.send(await beside_the_loop(size, functools.partial(frames.pieces_of, number, answer)))
    outbox.sent(ticket)
    await stream.give_credit()
