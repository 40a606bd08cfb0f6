"""One side of a gRPC stream: frames go out and come in as chunks, within the windows of both sides.

All methods run on the event loop. Copies of much memory run on other threads.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import grpc

from fedsplit.wire import chunks
from fedsplit.wire.chunks import LARGEST_CHUNK, Assembler, Chunk, Refused
from fedsplit.wire.windows import ReceiveWindow, SendWindow

T = TypeVar("T")
R = TypeVar("R")

_AT_ONCE = 2**15
"""Bytes that are copied on the event loop. A change of threads takes longer than the copy of so few bytes."""

_threads = ThreadPoolExecutor(4, "grpc-chunks")

OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", chunks.LARGEST_MESSAGE),
    ("grpc.max_send_message_length", chunks.LARGEST_MESSAGE),
    # A peer whose machine is gone is noticed within a minute. On a slow link, an answer waits behind the data.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 30_000),
    ("grpc.http2.ping_timeout_ms", 30_000),  # of any ping: while one has no answer, gRPC sends none for keepalive
    ("grpc.http2.max_pings_without_data", 0),  # a client may train for minutes between two packets
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
]
"""Options of both sides."""


async def beside_the_loop(size: int, work: Callable[[], R]) -> R:
    """Calls a function that copies memory: on another thread if there is much to copy.

    Args:
        size: Bytes to copy, about.
        work: The function.
    """
    if size <= _AT_ONCE:
        return work()
    return await asyncio.get_running_loop().run_in_executor(_threads, work)


class ChunkStream(Generic[T]):
    """One side of a stream.

    One coroutine may send while another one receives.
    """

    def __init__(
        self,
        read: Callable[[], Awaitable[Any]],
        write: Callable[[bytes], Awaitable[None]],
        assembler: Assembler[T],
        window: ReceiveWindow,
        pause: float,
        held: Callable[[], int] = lambda: 0,
    ) -> None:
        """Takes the two directions of a gRPC call.

        Args:
            read: Waits for the next message; returns `grpc.aio.EOF` at the end.
            write: Sends a message.
            assembler: Puts the peer's frames together.
            window: Window for the peer.
            pause: Longest time without progress in seconds.
            held: Returns the bytes of frames that have come, and that this side is not done with.
        """
        self._read = read
        self._write = write
        self._assembler = assembler
        self._incoming = window
        self._outgoing = SendWindow()
        self._credit_came = asyncio.Event()
        self._writing = asyncio.Lock()
        self._next = 0
        self._pause = pause
        self._held = held
        self._heard = time.monotonic()
        self._sending_since: float | None = None
        self.most = 0
        """Most packets without an answer, as the peer says; 0 for no limit."""

    async def greet(self, most: int = 0) -> None:
        """Sends the first message: credit for the peer, and the most packets that may wait for an answer."""
        await self._send(Chunk(credit=self._incoming.grant(), most=most))

    async def welcome(self) -> None:
        """Waits for the first message of the peer.

        Raises:
            Refused: The message does not come in time, or gives no credit.
        """
        try:
            async with asyncio.timeout(self._pause):
                message = await self._read()
        except TimeoutError as error:
            raise Refused("DEADLINE_EXCEEDED", f"no message came in {self._pause:g} s") from error
        chunk = Chunk() if message is grpc.aio.EOF else Chunk.from_bytes(message)
        if not chunk.credit or chunk.data:
            raise Refused("INVALID_ARGUMENT", "the first message of a stream must give credit, and have no data")
        self.most = chunk.most
        self._add_credit(chunk.credit)

    def _add_credit(self, credit: int) -> None:
        self._outgoing.add(credit)
        self._credit_came.set()

    async def send(self, pieces: Sequence[memoryview]) -> None:
        """Sends a frame, as the peer gives credit."""
        total = left = chunks.nbytes_of(pieces)
        for data in chunks.cut(pieces):
            size = chunks.nbytes_of(data)
            self._sending_since = time.monotonic()
            while self._outgoing.room < size:
                # No credit is missed between the look and the wait, since it comes on the same event loop.
                self._credit_came.clear()
                await self._credit_came.wait()
            self._outgoing.spend(size)
            # Only the first chunk of a frame says how long the frame is.
            chunk = Chunk(self._next, total if left == total else 0, data=data)
            self._next += 1
            left -= size
            await self._send(chunk, size)
        self._sending_since = None

    async def _send(self, chunk: Chunk, size: int = 0) -> None:
        message = await beside_the_loop(size, chunk.to_bytes)
        async with self._writing:  # gRPC takes one message at a time
            await self._write(message)

    async def receive(self, count: Callable[[int], None] = lambda size: None) -> T | None:
        """Waits for a frame. The caller then gives the peer credit, once the caller knows what it holds.

        Args:
            count: Called with the size of each message, for limits.

        Returns:
            The frame; None if the peer has sent the last one.

        Raises:
            Refused: The peer has sent what it may not send.
        """
        while True:
            message = await self._read()
            if message is grpc.aio.EOF:
                if self._assembler.left:
                    raise Refused("INVALID_ARGUMENT", "the stream ended in the middle of a frame")
                return None
            count(len(message))
            # A small chunk may be the last one of a large frame, whose pieces are joined.
            size = max(len(message), self._assembler.total)
            chunk, frame = await beside_the_loop(size, functools.partial(self._take, message))
            # The message must not stay in memory while the stream is silent.
            del message
            if chunk.credit:
                self._add_credit(chunk.credit)
            if frame is not None:
                return frame
            if chunk.data:
                self._heard = time.monotonic()
                await self.give_credit()

    def _take(self, message: bytes) -> tuple[Chunk, T | None]:
        """Reads a message. No other call runs at the same time, since the next message is read later."""
        chunk = Chunk.from_bytes(message)
        if not chunk.data:
            if not chunk.credit:
                raise Refused("INVALID_ARGUMENT", "a chunk has neither data nor credit")
            return chunk, None
        self._incoming.take(len(chunk.data))
        return chunk, self._assembler.take(chunk)

    async def give_credit(self) -> None:
        """Gives the peer credit, if there is enough room for more bytes."""
        credit = self._incoming.grant(self._held())
        if credit:
            self._heard = time.monotonic()  # before, the peer could not go on
            await self._send(Chunk(credit=credit))

    async def watch(self) -> None:
        """Waits for ever, or until the peer makes no progress where progress depends on the peer alone.

        Raises:
            Refused: The peer stands in the middle of a frame, or takes no more bytes.
        """
        while True:
            await asyncio.sleep(self._pause / 4)
            latest = time.monotonic() - self._pause
            left = self._assembler.left
            may_send = self._incoming.outstanding >= min(left, LARGEST_CHUNK)
            if left and may_send and self._heard < latest:
                words = f"no byte came in {self._pause:g} s in the middle of a frame"
                raise Refused("DEADLINE_EXCEEDED", words)
            if self._sending_since is not None and self._sending_since < latest:
                raise Refused("DEADLINE_EXCEEDED", f"no byte was taken in {self._pause:g} s")
