"""Ends waits for code that does not return, such as a strategy, an objective or a data set of the user's that hangs."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

LOOK_SECONDS = 0.5
"""Time between two looks at whether something hangs."""


class Hung(BaseException):
    """A piece of work has not returned in the time that it had. The thread that does the work cannot be ended.

    No `except Exception` of the code that hangs, or of a library, may take the place of the end of the command.
    """


class Watchdog:
    """Knows what this process is doing, and since when.

    Attributes:
        seconds: Time that a piece of work may take between two beats.

    Example:
        >>> now = 0.0
        >>> watchdog = Watchdog(60.0, clock=lambda: now)
        >>> with watchdog.doing("the strategy"):
        ...     now = 61.0
        ...     watchdog.check()
        Traceback (most recent call last):
        ...
        fedsplit.watchdog.Hung: the strategy has not returned for 60 seconds
        >>> watchdog.check()  # nothing is being done
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Starts with nothing to do.

        Args:
            seconds: Time that a piece of work may take between two beats.
            clock: Seconds, always growing.
        """
        self.seconds = seconds
        self._clock = clock
        self._work = ""
        self._since = 0.0

    @contextlib.contextmanager
    def doing(self, work: str) -> Iterator[None]:
        """Watches a piece of work. Work within other work is watched by itself, and is a sign of life of the other.

        Args:
            work: Name of the work, for the message.
        """
        before, self._work = self._work, work
        self._since = self._clock()
        try:
            yield
        finally:
            self._since = self._clock()
            self._work = before

    @contextlib.contextmanager
    def guarding(self, work: str) -> Iterator[None]:
        """Watches a piece of work, and looks at it from within the main thread.

        Args:
            work: Name of the work, for the message.
        """
        with self.looking(), self.doing(work):
            yield

    def beat(self) -> None:
        """Notes that the work goes on."""
        self._since = self._clock()

    def check(self) -> None:
        """Looks whether the work goes on; may be called from another thread.

        Raises:
            Hung: The work has neither ended nor beaten in time.
        """
        work = self._work
        if work and self._clock() - self._since >= self.seconds:
            raise Hung(f"{work} has not returned for {self.seconds:g} seconds")

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Looks at regular intervals from within the main thread, and raises `Hung` there.

        A signal interrupts Python code, and most waits of libraries. Outside the main thread, where no signal arrives,
        nobody looks.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def look(number: int, frame: FrameType | None) -> None:
            self.check()

        handler = signal.signal(signal.SIGALRM, look)
        timer = signal.setitimer(signal.ITIMER_REAL, LOOK_SECONDS, LOOK_SECONDS)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)  # no signal may come between the two handlers
            signal.signal(signal.SIGALRM, handler)
            signal.setitimer(signal.ITIMER_REAL, *timer)
