"""The answers of one gRPC stream that the client has not got yet, and the bytes that packets and answers take."""

from __future__ import annotations

import asyncio

from fedsplit.wire.chunks import Refused
from fedsplit.wire.packets import Packet

_ALWAYS = 2
"""Packets of any size that may be on the way at once, so that client and trunk can work at the same time."""


class Outbox:
    """Queue of answers, with a limit for packets without an answer. All methods run on the event loop.

    Example:
        >>> outbox = Outbox(most=1)
        >>> ticket = outbox.take(100)
        >>> outbox.take(100)
        Traceback (most recent call last):
        fedsplit.wire.chunks.Refused: more than 1 packets wait for an answer
    """

    def __init__(self, most: int) -> None:
        """Starts empty.

        Args:
            most: Most packets without an answer that the client has.
        """
        self._most = most
        self._answers: asyncio.Queue[tuple[int, int, Packet | Exception]] = asyncio.Queue()
        self._sizes: dict[int, int] = {}
        self._tickets = 0
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    def take(self, nbytes: int) -> int:
        """Notes a packet with a number of bytes. Returns a ticket for the answer.

        Raises:
            Refused: Too many packets wait for an answer.
        """
        if len(self._sizes) >= self._most:
            raise Refused("RESOURCE_EXHAUSTED", f"more than {self._most} packets wait for an answer")
        self._tickets += 1
        self._sizes[self._tickets] = nbytes
        self._is_empty.clear()
        return self._tickets

    def put(self, ticket: int, number: int, answer: Packet | Exception) -> None:
        """Queues the answer to a packet. From now on, the answer's bytes count in place of the packet's bytes."""
        self._sizes[ticket] = answer.nbytes if isinstance(answer, Packet) else 0
        self._answers.put_nowait((ticket, number, answer))

    async def get(self) -> tuple[int, int, Packet | Exception]:
        """Waits for the next answer to send."""
        return await self._answers.get()

    def sent(self, ticket: int) -> None:
        """Notes that an answer was sent."""
        del self._sizes[ticket]
        if not self._sizes:
            self._is_empty.set()

    def held(self) -> int:
        """Returns the bytes that count against the client's window."""
        return sum(self._sizes.values()) if len(self._sizes) >= _ALWAYS else 0

    async def drained(self) -> None:
        """Waits until all answers are sent."""
        await self._is_empty.wait()
