"""Clocks: where leases, deadlines and timeouts read the time."""

from __future__ import annotations

from collections.abc import Callable

Clock = Callable[[], float]
"""Returns the time in seconds, which never decreases; `time.monotonic` is one, a `ManualClock` another."""


class ManualClock:
    """A clock that only moves when it is told to, for tests and for a trunk that runs in its caller's thread.

    Example:
        >>> clock = ManualClock()
        >>> clock.advance_to(2.5)
        >>> clock.advance_to(1.0)  # a clock never goes back
        >>> clock()
        2.5
    """

    def __init__(self, start: float = 0.0) -> None:
        """Sets the time, in seconds."""
        self._now = start

    def __call__(self) -> float:
        """Returns the time in seconds."""
        return self._now

    def advance_to(self, time: float) -> None:
        """Moves the clock forward to a time; an earlier one leaves it as it is."""
        self._now = max(self._now, time)
