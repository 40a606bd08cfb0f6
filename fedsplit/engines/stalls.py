"""Detects a run without progress, so that no wait lasts forever."""

from __future__ import annotations

import time
from collections.abc import Callable

from fedsplit.federation.clients import FederationFailed


class StallWatch:
    """Distinguishes a slow federation from a federation that hangs, by signs of life.

    A sign of life is a client's reply, or a packet to the trunk. After a time without any, the client processes are
    killed: clients at work count as failed, and waiting clients get new processes. Without a sign of life after that,
    the federation has failed.
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
        # The time begins again: after a kill, new processes have as long for a sign of life.
        self._since = self._clock()
        # The first look has nothing to compare with, and so counts as a sign of life.
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
