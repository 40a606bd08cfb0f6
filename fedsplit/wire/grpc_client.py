"""gRPC as transport: the client's side of packets to a trunk that others run.

The server's side is `fedsplit.wire.grpc_server`. A broken stream is opened again, and every packet without an answer is
sent again. The trunk counts a step once, and gives a repeated packet the same answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedsplit.wire import frames
from fedsplit.wire.chunks import Assembler, Refused, blob_reading
from fedsplit.wire.event_loop import event_loop, start
from fedsplit.wire.grpc_address import LIFE, REQUEST, GrpcAddress, entry
from fedsplit.wire.grpc_calls import BROKEN, Broken, RefusedByServer, ServerStreams, telling_cancellations_apart
from fedsplit.wire.grpc_schema import CONTROL, PACKETS
from fedsplit.wire.grpc_streams import ChunkStream
from fedsplit.wire.packets import Packet
from fedsplit.wire.retries import Patience
from fedsplit.wire.tls import NotTrusted
from fedsplit.wire.transport import PendingAnswer, TrunkLost, Unanswered, remembered

PATIENCE = 60.0
"""Seconds for which a client tries to reach a server again."""


@dataclass(frozen=True)
class _Sent:
    """A packet without an answer.

    Attributes:
        pieces: The packet's frame. The memory of the arrays is the packet's own.
        put: Takes the answer.
    """

    pieces: list[memoryview]
    put: Callable[[Packet | Exception], None]


class GrpcClient:
    """A transport to a `GrpcServer`. Not thread-safe, except for `control`.

    The example of `GrpcServer` shows a client.
    """

    def __init__(
        self,
        address: GrpcAddress,
        client: int | None = None,
        *,
        patience: float = PATIENCE,
        silence: float | None = None,
    ) -> None:
        """Connects at the first packet or control request.

        Args:
            address: Address of the server.
            client: Number of the client; None for the operator, or on one machine for a process that plays several
                clients.
            patience: Seconds without progress after which the trunk counts as lost.
            silence: Seconds that a server may be silent during a control request; None for no limit. Packets have no
                such limit: a client may wait for its turn.

        Raises:
            InputError: The server is on another machine, and there are no certificates.
            NotTrusted: The certificates of this side cannot be used.
        """
        self._streams = ServerStreams(address, client)
        self._silence = silence
        self._patience = patience
        self._next = 0
        # All that follows is used on the event loop only.
        self._waiting: dict[int, _Sent] = {}
        self._unsent: dict[int, _Sent] = {}
        self._changed = asyncio.Event()
        self._error: Exception | None = None
        self._playing: asyncio.Task[None] | None = None

    def send(self, packet: Packet) -> PendingAnswer:
        """Sends a packet, as `PacketTransport.send` does. The packet's arrays must not change before the answer.

        Raises:
            NotTrusted: The server does not accept the certificate or the token, or the other way round.
            RefusedByServer: The client goes beyond a limit of the server.
            Unanswered: The client is closed.
        """
        if self._error is not None:
            raise self._error
        answers: queue.SimpleQueue[Packet | Exception] = queue.SimpleQueue()
        number = self._next
        self._next += 1
        sent = _Sent(frames.pieces_of(number, packet), answers.put)
        event_loop().call_soon_threadsafe(self._post, number, sent)
        return remembered(answers.get)

    def forget(self) -> None:
        """Drops the answers to all packets sent so far."""
        event_loop().call_soon_threadsafe(self._drop, self._next)

    def close(self) -> None:
        """Ends the stream. Packets without an answer get an `Unanswered`."""
        start(self._close()).result()

    def control(self, request: bytes) -> bytes:
        """Sends a control request, and waits for the reply. Any thread may call.

        The server carries a request out once, although a broken stream makes this method send the request again.

        Args:
            request: The request; not empty.

        Raises:
            TrunkLost: The server is gone, is silent for too long, or was started again during the request.
            NotTrusted, RefusedByServer: As for packets. A client other than the operator is not trusted.
            RefusedStep, TrunkFailed: The trunk's error.
        """
        future = start(self._control(request))
        try:
            return future.result()
        finally:
            # A caller that is interrupted must not leave the request behind on the event loop.
            future.cancel()

    def _post(self, number: int, sent: _Sent) -> None:
        """Takes a packet onto the event loop."""
        if self._error is not None:
            sent.put(self._error)
            return
        self._waiting[number] = sent
        self._unsent[number] = sent
        self._changed.set()
        if self._playing is None or self._playing.done():
            self._playing = asyncio.ensure_future(self._play())
            self._playing.add_done_callback(self._check_end)

    def _check_end(self, playing: asyncio.Task[None]) -> None:
        """Hands an unexpected error to all who wait. Nobody else would ever hear of it."""
        error = None if playing.cancelled() else playing.exception()
        if isinstance(error, Exception):
            self._fail(error)

    def _drop(self, end: int) -> None:
        """Drops packets up to a number. A packet that is being sent is sent to its end."""
        for number in [number for number in self._waiting if number < end]:
            self._unsent.pop(number, None)
            self._waiting.pop(number).put(Unanswered("the answer was dropped by `forget`"))

    async def _close(self) -> None:
        self._error = Unanswered("the connection is closed")
        if self._playing is not None:
            self._playing.cancel()
            await asyncio.gather(self._playing, return_exceptions=True)
        self._fail(self._error)

    def _fail(self, error: Exception) -> None:
        """Gives every packet without an answer an error."""
        waiting = list(self._waiting.values())
        self._waiting.clear()
        self._unsent.clear()
        for sent in waiting:
            sent.put(type(error)(*error.args) if type(error) in (TrunkLost, Unanswered) else error)

    async def _play(self) -> None:
        """Opens stream after stream while packets wait for answers."""
        patience = Patience(self._patience)
        while self._waiting:
            # A new stream knows nothing of what the last one has sent.
            self._unsent = dict(self._waiting)
            try:
                await self._one_stream(patience)
            except Broken as broken:
                if not self._waiting:
                    return  # the next packet opens a stream
                if patience.is_over():
                    self._fail(TrunkLost(f"the trunk cannot be reached any more ({broken})"))
                    return
                await asyncio.sleep(patience.wait())
            except (NotTrusted, RefusedByServer) as error:
                self._error = error
                self._fail(error)
                return

    async def _one_stream(self, patience: Patience) -> None:
        """Sends packets and takes answers until the stream breaks.

        Raises:
            Broken: The stream has ended.
            NotTrusted, RefusedByServer: A second stream would end in the same way.
        """
        async with self._streams.opened(PACKETS) as call:
            assembler = Assembler(lambda total: frames.reading(), frames.LARGEST_PACKET)
            stream = await self._streams.greeted(call, assembler)
            patience.began()
            unanswered: set[int] = set()
            room = asyncio.Event()
            writing = asyncio.ensure_future(self._write(stream, unanswered, room))
            reading = asyncio.ensure_future(self._read(stream, unanswered, room, patience))
            try:
                done, _ = await asyncio.wait([writing, reading], return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                writing.cancel()
                reading.cancel()
                # Both have to end before the call does. Their further errors only follow from the first.
                await asyncio.gather(writing, reading, return_exceptions=True)

    async def _write(
        self,
        stream: ChunkStream[Any],
        unanswered: set[int],
        room: asyncio.Event,
    ) -> None:
        """Sends packets for ever."""
        while True:
            while not self._unsent:
                # No packet is missed between the look and the wait, since `_post` runs on the same event loop.
                self._changed.clear()
                await self._changed.wait()
            while stream.most and len(unanswered) >= stream.most:
                room.clear()
                await room.wait()
            await self._write_one(stream, unanswered)

    async def _write_one(self, stream: ChunkStream[Any], unanswered: set[int]) -> None:
        """Sends one packet. A loop in here would keep the last packet in memory while there is none to send."""
        if not self._unsent:  # dropped during the wait
            return
        number = next(iter(self._unsent))
        sent = self._unsent.pop(number)
        unanswered.add(number)
        await stream.send(sent.pieces)

    async def _read(
        self,
        stream: ChunkStream[tuple[int, Packet | Exception]],
        unanswered: set[int],
        room: asyncio.Event,
        patience: Patience,
    ) -> None:
        """Takes answers to the end of the stream."""
        while await self._read_one(stream, unanswered):
            room.set()
            patience.progressed()
        raise Broken("the server has ended the stream")

    async def _read_one(
        self,
        stream: ChunkStream[tuple[int, Packet | Exception]],
        unanswered: set[int],
    ) -> bool:
        """Takes one answer. A loop in here would keep the last answer in memory while the stream is silent."""
        frame = await stream.receive()
        if frame is None:
            return False
        number, answer = frame
        unanswered.discard(number)
        sent = self._waiting.pop(number, None)
        if sent is not None:
            sent.put(answer)
        await stream.give_credit()
        return True

    async def _control(self, request: bytes) -> bytes:
        """Sends a request until there is a reply."""
        if not request:
            raise ValueError("a control request may not be empty")
        patience = Patience(self._patience)
        metadata = [(REQUEST, secrets.token_hex(16))]
        while True:
            try:
                return await self._control_once(request, metadata, patience)
            except Broken as broken:
                if patience.is_over():
                    raise TrunkLost(f"the trunk cannot be reached any more ({broken})") from broken
                await asyncio.sleep(patience.wait())

    async def _control_once(
        self,
        request: bytes,
        metadata: list[tuple[str, str]],
        patience: Patience,
    ) -> bytes:
        """Sends a request by one stream.

        Args:
            request: The request.
            metadata: Identity of the request; and, once a server has got the request, the server's life.
            patience: Is told of progress.
        """
        async with self._streams.opened(CONTROL, *metadata) as call:
            stream = await self._streams.greeted(call, Assembler(blob_reading, frames.LARGEST_PACKET), self._silence)
            patience.began()
            if len(metadata) == 1:
                metadata.append((LIFE, entry(await call.grpc.initial_metadata(), LIFE)))
            sending = asyncio.ensure_future(stream.send([memoryview(request)]))
            try:
                reply = await stream.receive()
                if reply is None:
                    raise Broken("the server has ended the stream")
                await sending  # its task may not have heard that all is sent, and a cancelled write ends the whole call
            finally:
                sending.cancel()
            # The reply is here. An error now must not have the request repeated, which the server may have forgotten.
            with contextlib.suppress(*BROKEN, Refused, TrunkLost), telling_cancellations_apart():
                await call.grpc.done_writing()  # the server need not keep the reply
                await stream.receive()
            return reply
