"""Retries after a broken stream: how long to wait before the next one, and when to give up."""

from __future__ import annotations

import random
import time

from fedsplit.clock import Clock

_SHORTEST_WAIT = 0.05
_LONGEST_WAIT = 2.0


class Patience:
    """Counts the time without progress, from the first broken stream on.

    A stream that lives for longer than the patience is progress, too: a trunk may compute for minutes.

    Example:
        >>> now = [0.0]
        >>> patience = Patience(60.0, clock=lambda: now[0])
        >>> patience.is_over()
        False
        >>> now[0] = 61.0
        >>> patience.is_over()
        True
        >>> patience.progressed()
        >>> patience.is_over()
        False
    """

    def __init__(self, seconds: float, clock: Clock = time.monotonic) -> None:
        """Has made progress now.

        Args:
            seconds: Longest time without progress.
            clock: Clock that never goes back.
        """
        self._seconds = seconds
        self._clock = clock
        self._broken_since: float | None = None
        self._began: float | None = None
        self._wait = _SHORTEST_WAIT

    def began(self) -> None:
        """Notes the begin of a stream."""
        self._began = self._clock()

    def progressed(self) -> None:
        """Notes progress."""
        self._broken_since = None
        self._wait = _SHORTEST_WAIT

    def is_over(self) -> bool:
        """Notes a broken stream. Returns True if it is time to give up."""
        now = self._clock()
        if self._began is not None and now - self._began > self._seconds:
            self.progressed()
        self._began = None
        if self._broken_since is None:
            self._broken_since = now
        return now - self._broken_since >= self._seconds

    def wait(self) -> float:
        """Returns the seconds to wait before the next stream: longer each time, and not the same for all clients."""
        wait = self._wait * random.uniform(0.5, 1.0)
        self._wait = min(2 * self._wait, _LONGEST_WAIT)
        return wait
