"""Streams that a client opens to a gRPC server: connection, first messages, and what the end of a stream means."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc

from fedsplit.errors import first_line
from fedsplit.wire import frames
from fedsplit.wire.chunks import Assembler, Refused
from fedsplit.wire.grpc_address import CLIENT, ERROR, GrpcAddress, authorization, check_encrypted, entry
from fedsplit.wire.grpc_streams import OPTIONS, ChunkStream
from fedsplit.wire.tls import CA, CERTIFICATE, KEY, NotTrusted, problem, why_refused
from fedsplit.wire.transport import TrunkLost
from fedsplit.wire.windows import ReceiveWindow

T = TypeVar("T")

_WINDOW = 2**25
"""Bytes of answers that the server may send before the client has taken them."""

_WELCOME_SECONDS = 10.0
"""Longest wait for the first message of a server."""

_FOREVER = 1e9


class _EndedByPeer(Exception):
    """The peer has ended a stream with the status CANCELLED."""


BROKEN = (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError, OSError, _EndedByPeer)
"""Errors of gRPC's streams that are broken. `ExecuteBatchError`, a `BaseError`, comes from one that the peer ends."""


@contextlib.contextmanager
def telling_cancellations_apart() -> Iterator[None]:
    """Raises an error for a stream that the peer has cancelled, which gRPC reports as if this task were cancelled."""
    try:
        yield
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise _EndedByPeer("the server has cancelled the stream") from error


_CHANNEL_OPTIONS = [
    *OPTIONS,
    ("grpc.enable_retries", 0),  # the client repeats packets itself
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),  # a second client must not share the connection, nor its state
]

_CURABLE = ("UNAVAILABLE", "CANCELLED", "INTERNAL", "UNKNOWN", "DEADLINE_EXCEEDED")
"""Statuses after which a second stream may do better."""


class RefusedByServer(Exception):
    """The server refuses the client for a reason that no repetition can cure, such as a limit.

    Attributes:
        status: Name of the gRPC status.
    """

    def __init__(self, status: str, words: str) -> None:
        """Takes the name of the status, and the server's words."""
        super().__init__(f"the trunk's server refuses the stream: {words} ({status})")
        self.status = status

    def __reduce__(self) -> tuple[Any, ...]:
        # An error is pickled by its arguments, which are not those of this class. Ray carries errors between
        # processes.
        return _copy_of_refusal, (str(self), self.status)


def _copy_of_refusal(message: str, status: str) -> RefusedByServer:
    error = RefusedByServer(status, "")
    # The message is complete already.
    error.args = (message,)
    return error


@dataclass
class Call:
    """A stream of gRPC.

    Attributes:
        grpc: The library's call.
        is_welcome: True once the server has accepted the stream.
    """

    grpc: Any
    is_welcome: bool = False


class Broken(Exception):
    """A stream has ended, and may be opened again. The message is the reason."""


class ServerStreams:
    """Opens streams to one server.

    Example:
        >>> streams = ServerStreams(GrpcAddress("127.0.0.1", 50052, "", b"the token of the run"))
    """

    def __init__(self, address: GrpcAddress, client: int | None = None) -> None:
        """Opens none yet.

        Args:
            address: Address of the server.
            client: Number of the client; None for the operator, or on one machine for a process that plays several
                clients.

        Raises:
            InputError: The server is on another machine, and there are no certificates.
            NotTrusted: The certificates of this side cannot be used.
        """
        check_encrypted(address.host, address.tls)
        if address.tls and (reason := problem(Path(address.tls))):
            raise NotTrusted(reason)
        self._address = address
        self._client = client
        self._was_welcome = False

    @contextlib.asynccontextmanager
    async def opened(self, method: str, *metadata: tuple[str, str]) -> AsyncIterator[Call]:
        """Opens a stream, and turns the errors of the stream into this module's errors.

        Args:
            method: Method of the service.
            metadata: Metadata of the call, beside token and client.

        Raises:
            Broken: The stream has ended, and may be opened again.
            NotTrusted, RefusedByServer: A second stream would end in the same way.
            TrunkLost: The server has lost what the stream was about.
        """
        said = [authorization(self._address.token), *metadata]
        if self._client is not None:
            said.append((CLIENT, str(self._client)))
        channel = self._channel()
        call = Call(channel.stream_stream(method)(metadata=said))
        try:
            with telling_cancellations_apart():
                yield call
        except Refused as refused:  # by this side
            raise RefusedByServer(refused.status, f"the server does not keep to the protocol: {refused}") from refused
        except _EndedByPeer as error:
            raise Broken(str(error)) from error
        except BROKEN as error:
            raise await self._explained(call) from error
        finally:
            call.grpc.cancel()
            await channel.close(None)

    def _channel(self) -> Any:
        """Returns a channel. A new one for each stream connects at once, and has no memory of earlier failures."""
        address = self._address
        if not address.tls:
            return grpc.aio.insecure_channel(address.target, options=_CHANNEL_OPTIONS)
        folder = Path(address.tls)
        ca, key, certificate = ((folder / name).read_bytes() for name in (CA, KEY, CERTIFICATE))
        credentials = grpc.ssl_channel_credentials(ca, key, certificate)
        return grpc.aio.secure_channel(address.target, credentials, options=_CHANNEL_OPTIONS)

    async def greeted(
        self,
        call: Call,
        assembler: Assembler[T],
        silence: float | None = None,
    ) -> ChunkStream[T]:
        """Exchanges the first messages.

        Args:
            call: The stream, from `opened`.
            assembler: Puts the server's frames together.
            silence: Seconds without any message after which the server counts as lost; None for no limit.

        Raises:
            Broken: The server says nothing at first.
        """

        async def read() -> Any:
            try:
                async with asyncio.timeout(silence):
                    return await call.grpc.read()
            except TimeoutError as error:
                raise TrunkLost(f"the trunk's server has not answered for {silence:g} seconds") from error

        # No pause ends a stream of a client, since the trunk may compute for any time.
        stream = ChunkStream(read, call.grpc.write, assembler, ReceiveWindow(_WINDOW), _FOREVER)
        try:
            async with asyncio.timeout(_WELCOME_SECONDS):
                await stream.greet()
                await stream.welcome()
        except TimeoutError as error:
            raise Broken(f"the server is silent for {_WELCOME_SECONDS:g} s") from error
        call.is_welcome = True
        self._was_welcome = True
        return stream

    async def _explained(self, call: Call) -> Exception:
        """Returns the error for the end of a call."""
        try:
            async with asyncio.timeout(_WELCOME_SECONDS):
                status = (await call.grpc.code()).name
        except TimeoutError:
            return Broken("the stream is broken, and the server does not say why")
        words = await call.grpc.details() or ""
        name = entry(await call.grpc.trailing_metadata(), ERROR)
        if name:
            return frames.error_named(name)(words)
        if status == "ABORTED":
            return TrunkLost(words)
        if status in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            return NotTrusted(f"the trunk's server refuses the client: {words}")
        # gRPC does not tell a refused certificate from a server that is gone.
        if status == "UNAVAILABLE" and self._address.tls and not self._was_welcome:
            reason = await asyncio.to_thread(self._mistrust)
            if reason:
                return NotTrusted(reason)
        # After a broken stream, the server may not have noticed yet that the stream is gone.
        is_full = status == "RESOURCE_EXHAUSTED" and self._was_welcome and not call.is_welcome
        if status in _CURABLE or is_full:
            return Broken(first_line(Exception(words)))
        return RefusedByServer(status, words)

    def _mistrust(self) -> str:
        """Returns why this side and the server do not trust each other; empty if they do, or if there is no server."""
        return why_refused(self._address.host, self._address.port, self._address.tls, _WELCOME_SECONDS)
