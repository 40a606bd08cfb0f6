"""A process's resident memory, and a budget for it."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Callable
from typing import Literal

import psutil

from fedsplit.allowed import SettingError
from fedsplit.config import TrunkSettings

Room = Literal["graph", "input", "none"]


def peak_memory() -> int:
    """The most resident memory this process has had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory() -> int:
    """The resident memory of this process, in bytes."""
    return int(psutil.Process().memory_info().rss)


def return_free_pages() -> None:
    """Gives memory that was freed back to the system; glibc keeps it otherwise, and it counts as resident."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


class Budget:
    """Decides what may be kept of a forward so that resident memory stays under a limit.

    Room is always left for the one step that is being computed; only one ever is.

    Attributes:
        limit: Bytes; None where there is no limit.
    """

    def __init__(
        self,
        limit: int | None,
        resident: Callable[[], int] = resident_memory,
        release: Callable[[], None] = return_free_pages,
    ) -> None:
        """Sets the limit.

        Args:
            limit: Bytes; None for no limit.
            resident: Tells how many bytes are resident.
            release: Gives freed memory back to the system.
        """
        self.limit = limit
        self._resident, self._release = resident, release
        self._graph = self._working = 0.0
        self._freed = True

    def learn(self, tokens: int, graph: int, working: int) -> None:
        """Takes over what a step was seen to need.

        Args:
            tokens: Of the step, B * T.
            graph: Bytes its graph holds.
            working: Bytes that computing it added to resident memory at the worst, the graph included.
        """
        self._graph = max(self._graph, graph / tokens)
        self._working = max(self._working, working / tokens)

    def freed(self) -> None:
        """Something was freed: there may be pages to give back again."""
        self._freed = True

    def least(self, tokens: int, kept: int) -> int:
        """The smallest limit under which a step can be served at all, in bytes."""
        self._release()
        return self._resident() + int(kept + self._need(tokens))

    def _need(self, tokens: int) -> float:
        """What computing a step takes, beside what is kept of others."""
        return max(self._working, self._graph) * tokens

    def graph(self, tokens: int) -> float:
        """Bytes that the graph of a step holds."""
        return self._graph * tokens

    def fits(self, tokens: int, kept: float = 0.0) -> bool:
        """Whether a step can be computed and so many bytes be kept besides; frees pages where it would not.

        Args:
            tokens: Of the step, B * T.
            kept: Bytes.
        """
        if self.limit is None:
            return True
        needed = kept + self._need(tokens)
        if self._resident() + needed <= self.limit:
            return True
        if self._freed:  # else there is nothing to give back
            self._release()
            self._freed = False
        return self._resident() + needed <= self.limit

    def room(self, tokens: int, kept: int) -> Room:
        """What may be kept of a step.

        Args:
            tokens: Of the step, B * T.
            kept: Bytes that are kept of it in any case.
        """
        if self.fits(tokens, kept + self.graph(tokens)):
            return "graph"
        return "input" if self.fits(tokens, kept) else "none"


def check_memory(settings: TrunkSettings, least: int) -> None:
    """Makes sure that the memory given to the trunk suffices; only the trunk, once it is loaded, can tell.

    Args:
        settings: Settings of the trunk.
        least: Bytes that the trunk needs for a single step.

    Raises:
        SettingError: The memory does not suffice.
    """
    limit = settings.memory_bytes
    if limit is not None and least > limit:
        allowed = f"at least {-(-least // 10**6)}MB, for this trunk and one step at a time"
        raise SettingError("trunk.memory", settings.memory, allowed)
