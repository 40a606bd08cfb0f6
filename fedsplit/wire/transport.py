"""Transports: ways for packets from a client to a trunk, and the error of all transports when the trunk is gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from fedsplit.wire.packets import Packet

PendingAnswer = Callable[[], Packet]
"""Waits for the answer to a packet, and returns the answer."""


def remembered(wait: Callable[[], Packet | Exception]) -> PendingAnswer:
    """Returns a function that waits for an answer once, and may be called again. An error as the answer is raised.

    Args:
        wait: Waits for the answer, or for the error in place of an answer.

    Example:
        >>> from fedsplit.wire.packets import StepKey
        >>> answers = [Packet(StepKey(round=1, client=0, step=0))]
        >>> answer = remembered(answers.pop)
        >>> answer() is answer()
        True
    """
    known: list[Packet | Exception] = []

    def answer() -> Packet:
        if not known:
            known.append(wait())
        if isinstance(known[0], Exception):
            raise known[0]
        return known[0]

    return answer


class TrunkLost(Exception):
    """The trunk is gone, or never came up. Every transport raises the same error."""


class Unanswered(TrunkLost):
    """The connection broke before the answer came. A second transport may still get an answer."""


class PacketTransport(Protocol):
    """A way for packets to a trunk. Not thread-safe."""

    def send(self, packet: Packet) -> PendingAnswer:
        """Sends a packet without waiting for the answer.

        Returns:
            A function that waits for the answer. Raises `TrunkLost`, or a `RefusedStep` if the trunk must not serve
            the packet.

        Raises:
            TrunkLost: The trunk is gone.
        """
        ...

    def forget(self) -> None:
        """Drops the answers to all packets sent so far."""
        ...


class FallbackTransport:
    """Sends packets by a first transport, and repeats unanswered packets by a second transport.

    The trunk counts every step once, so a packet that arrives by both ways does no harm.

    Example:
        >>> from fedsplit.wire.packets import StepKey
        >>> class Broken:
        ...     def send(self, packet):
        ...         raise Unanswered("no connection")
        >>> class Echo:
        ...     def send(self, packet):
        ...         return lambda: packet
        >>> packet = Packet(StepKey(round=1, client=0, step=0))
        >>> FallbackTransport(Broken(), Echo()).send(packet)() is packet
        True
    """

    def __init__(self, first: PacketTransport, second: PacketTransport) -> None:
        """Joins two transports.

        Args:
            first: Transport to try first. Raises `Unanswered` after a broken connection.
            second: Transport for packets without an answer from the first transport.
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
            except Unanswered:  # the trunk may have served the packet: a repetition gets the same answer
                return self._second.send(packet)()

        return wait

    def forget(self) -> None:
        """Drops the answers to all packets sent so far."""
        self._first.forget()
        self._second.forget()
