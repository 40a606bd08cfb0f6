"""Transports: ways for packets from a client to a trunk, and the error that they raise when the trunk is gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from fedsplit.wire.packets import Packet

PendingAnswer = Callable[[], Packet]
"""Waits for the answer to a packet, and returns it."""


class TrunkLost(Exception):
    """The trunk is gone, or never came up; the same error for every transport."""


class Unanswered(TrunkLost):
    """The connection broke before the answer came; another transport may still get one."""


class PacketTransport(Protocol):
    """A way for packets to a trunk. Used by one thread."""

    def send(self, packet: Packet) -> PendingAnswer:
        """Sends a packet without waiting for the answer.

        Raises:
            TrunkLost: The trunk is gone; here, or where the answer is waited for.
            RefusedStep: Where the answer is waited for: the trunk must not serve the packet.
        """
        ...

    def forget(self) -> None:
        """Drops the answers to all packets sent so far."""
        ...


class FallbackTransport:
    """Sends packets by one transport, and repeats those that it left unanswered by another one.

    The trunk counts every step once, so a packet that arrives by both ways does no harm.
    """

    def __init__(self, first: PacketTransport, second: PacketTransport) -> None:
        """Joins two transports.

        Args:
            first: Transport that is tried first; raises `Unanswered` where its connection is broken.
            second: Transport for packets that the first one could not carry.
        """
        self._first = first
        self._second = second

    def send(self, packet: Packet) -> PendingAnswer:
        """Sends a packet, as `PacketTransport.send` does."""
        try:
            answer = self._first.send(packet)
        except Unanswered:
            return self._second.send(packet)

        def wait() -> Packet:
            try:
                return answer()
            except Unanswered:
                return self._second.send(packet)()

        return wait

    def forget(self) -> None:
        """Drops the answers to all packets sent so far."""
        self._first.forget()
        self._second.forget()
