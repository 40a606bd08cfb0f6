"""Clocks: sources of the time for leases, deadlines and timeouts."""

from __future__ import annotations

from collections.abc import Callable

Clock = Callable[[], float]
"""Returns a time in seconds that never decreases, as `time.monotonic` and `ManualClock` do."""


class ManualClock:
    """A clock that moves when `advance_to` is called, for tests and for a trunk in its caller's thread.

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
        """Moves the clock forward to a time. An earlier time changes nothing."""
        self._now = max(self._now, time)
