"""Limits of a gRPC server: what one client may take, so that no client takes it from the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedsplit.clock import Clock
from fedsplit.errors import SettingError
from fedsplit.wire.chunks import Refused
from fedsplit.wire.windows import SMALLEST_WINDOW

_BURST_SECONDS = 10
"""Seconds for which a client may send what it has not sent before: steps come in bursts, and rounds have pauses."""


@dataclass(frozen=True)
class Limits:
    """Limits of a server. A client that goes beyond one of them is refused by a gRPC status and a line.

    Attributes:
        clients: Most clients with a stream at once.
        streams: Most streams of one client at once. After a broken connection, a client may have a second stream before
            the server notices the end of the first.
        pending: Most packets of one stream without an answer.
        window: Most bytes of one stream that are on the way or wait for an answer. Two packets may always be larger.
        largest_packet: Most bytes of a packet.
        largest_control: Most bytes of a control message, which may carry the adapters of all clients.
        rate: Most bytes that one client may send in a second, on an average of 10 seconds; 0 for no limit.
        pause: Longest time without progress in seconds: in the middle of a frame, or before a stream's first message.

    Example:
        >>> Limits(clients=8).pending
        64
        >>> Limits(window=1)
        Traceback (most recent call last):
        fedsplit.errors.SettingError: window: 1 is not possible; allowed: a number of at least 2097152
    """

    clients: int = 256
    streams: int = 4
    pending: int = 64
    window: int = 2**25
    largest_packet: int = 2**28
    largest_control: int = 2**32
    rate: int = 0
    pause: float = 60.0

    def __post_init__(self) -> None:
        """Checks the limits."""
        smallest = {"rate": 0, "pause": 0.001, "window": SMALLEST_WINDOW}
        for name, value in vars(self).items():
            least = smallest.get(name, 1)
            if value < least:
                raise SettingError(name, value, f"a number of at least {least}")


class RateLimit:
    """Bytes that a client may send now. The allowance grows with time, up to what 10 seconds bring.

    Example:
        >>> limit = RateLimit(100, clock=lambda: 0.0)
        >>> limit.take(1000)
        >>> limit.take(1)
        Traceback (most recent call last):
        fedsplit.wire.chunks.Refused: more than 100 bytes a second came
    """

    def __init__(self, rate: int, clock: Clock) -> None:
        """Begins with the whole allowance.

        Args:
            rate: Most bytes in a second; 0 for no limit.
            clock: Clock that never goes back.
        """
        self._rate = rate
        self._clock = clock
        self._allowed = float(rate * _BURST_SECONDS)
        self._since = clock()

    def take(self, nbytes: int) -> None:
        """Notes bytes that have come.

        Raises:
            Refused: The client has sent too much.
        """
        if not self._rate:
            return
        now = self._clock()
        grown = self._allowed + (now - self._since) * self._rate
        self._allowed = min(grown, self._rate * _BURST_SECONDS) - nbytes
        self._since = now
        if self._allowed < 0:
            raise Refused("RESOURCE_EXHAUSTED", f"more than {self._rate} bytes a second came")


class Admissions:
    """Streams that are open, by client.

    Example:
        >>> admissions = Admissions(Limits(clients=1))
        >>> leave = admissions.enter("hospital-a")
        >>> admissions.enter("hospital-b")
        Traceback (most recent call last):
        fedsplit.wire.chunks.Refused: the trunk has 1 client, and takes no more
        >>> leave()
    """

    def __init__(self, limits: Limits) -> None:
        """Has no open stream."""
        self._limits = limits
        self._open: dict[object, int] = {}

    def enter(self, client: object) -> Callable[[], None]:
        """Opens a stream of a client.

        Returns:
            A function that notes the end of the stream.

        Raises:
            Refused: The client, or the server, has too many open streams.
        """
        if client not in self._open and len(self._open) >= self._limits.clients:
            many = "client" if self._limits.clients == 1 else "clients"
            words = f"the trunk has {self._limits.clients} {many}, and takes no more"
            raise Refused("RESOURCE_EXHAUSTED", words)
        if self._open.get(client, 0) >= self._limits.streams:
            words = f"the client has {self._limits.streams} streams already, and may open no more"
            raise Refused("RESOURCE_EXHAUSTED", words)
        self._open[client] = self._open.get(client, 0) + 1
        return lambda: self._leave(client)

    def _leave(self, client: object) -> None:
        self._open[client] -= 1
        # An entry without a stream would count as a client for ever.
        if not self._open[client]:
            del self._open[client]
