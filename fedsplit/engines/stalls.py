"""Notices that nothing goes on any more, so that no wait is for ever."""

from __future__ import annotations

import time
from collections.abc import Callable

from fedsplit.federation.clients import FederationFailed


class StallWatch:
    """Tells a federation that is slow from one that hangs, by signs of life.

    A sign of life is a client's reply, or a packet that reached the trunk. Without any for a while, the processes that
    play clients are killed: their clients count as failed, and those behind them get a new process. If that does not
    help either, the federation has failed.
    """

    def __init__(
        self,
        seconds: float,
        progress: Callable[[], object],
        kill: Callable[[], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts with a sign of life.

        Args:
            seconds: Time without any sign of life after which something hangs.
            progress: Returns something else as soon as the trunk has got a packet; asked once in `seconds` at most.
            kill: Kills the processes that play clients and have not answered.
            clock: Seconds, always growing.
        """
        self._seconds, self._progress, self._kill, self._clock = seconds, progress, kill, clock
        self._seen: object = None
        self.heard()

    def heard(self) -> None:
        """Notes a reply."""
        self._since = self._clock()
        self._killed = False

    def look(self) -> None:
        """Acts if there was no sign of life for too long.

        Raises:
            FederationFailed: Killing the processes has not helped.
        """
        if self._clock() - self._since < self._seconds:
            return
        self._since = self._clock()
        before, self._seen = self._seen, self._progress()
        if self._seen != before:
            self._killed = False
            return
        if self._killed:
            raise FederationFailed(f"no client has answered, and no packet has come, for {self._seconds:g} seconds")
        self._killed = True
        self.kill()

    def kill(self) -> None:
        """Kills the processes that play clients and have not answered."""
        self._kill()
