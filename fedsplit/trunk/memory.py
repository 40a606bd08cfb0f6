"""Resident memory of a process, and a budget for it."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import psutil

Room = Literal["graph", "input", "none"]


def peak_memory() -> int:
    """Returns the largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in kibibytes, macOS in bytes


def forget_peak_memory() -> None:
    """Resets the largest resident memory of this process to the present one, for a process that plays several runs.

    Only Linux can do this. Elsewhere the peak of earlier runs stays.
    """
    with contextlib.suppress(OSError):  # no Linux, or a container without the right
        # proc(5): writing 5 resets the peak, and leaves the pages alone.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def free_memory() -> int:
    """Returns the memory that further processes may take without swapping, in bytes.

    Inside a container, the limit of the container counts where it is lower.
    """
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no such files, or "max" for no limit
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
        counts = dict(line.split() for line in lines)
        used -= int(counts.get("inactive_file", 0))  # files that were read: the system drops them first
        free = min(free, max(0, limit - used))
    return free


def resident_memory() -> int:
    """Returns the resident memory of this process, in bytes."""
    return int(psutil.Process().memory_info().rss)


def return_free_pages() -> None:
    """Returns freed memory to the system. Otherwise glibc keeps freed pages, and the pages count as resident."""
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has the function, musl does not
    if trim is not None:
        trim(0)


class Budget:
    """Decides how much of a forward may be kept so that resident memory stays under a limit.

    Memory for the computation of one step is always set aside, since one step is computed at a time.

    Attributes:
        limit: Limit in bytes; None for no limit.

    Example:
        >>> budget = Budget(1000, resident=lambda: 400, release=lambda: None)
        >>> budget.learn(tokens=10, graph=200, working=300)
        >>> budget.room(tokens=10, kept=0), budget.room(tokens=10, kept=300), budget.room(tokens=10, kept=400)
        ('graph', 'input', 'none')
    """

    def __init__(
        self,
        limit: int | None,
        resident: Callable[[], int] = resident_memory,
        release: Callable[[], None] = return_free_pages,
    ) -> None:
        """Sets the limit.

        Args:
            limit: Limit in bytes; None for no limit.
            resident: Returns the resident memory in bytes.
            release: Returns freed memory to the system.
        """
        self.limit = limit
        self._resident = resident
        self._release = release
        # Bytes a token. The largest measured need counts, since the need grows with the length of a sequence.
        self._graph = 0.0
        self._working = 0.0
        self._freed = True

    def learn(self, tokens: int, graph: int, working: int) -> None:
        """Learns from a measured step how much memory a step needs.

        Args:
            tokens: Tokens of the step, B * T.
            graph: Bytes in the graph of the step.
            working: Largest growth of resident memory during the step in bytes, including the graph.
        """
        self._graph = max(self._graph, graph / tokens)
        self._working = max(self._working, working / tokens)

    def freed(self) -> None:
        """Records that memory was freed. A later shortage may return the free pages to the system."""
        self._freed = True

    def least(self, tokens: int, kept: int) -> int:
        """Returns the smallest limit in bytes under which a step can be served."""
        # Pages that glibc keeps would count as needed, and the limit would come out too high.
        self._release()
        return self._resident() + int(kept + self._need(tokens))

    def _need(self, tokens: int) -> float:
        """Returns the bytes needed to compute a step, without the bytes that pending steps keep."""
        return max(self._working, self._graph) * tokens

    def graph(self, tokens: int) -> float:
        """Returns the bytes in the graph of a step."""
        return self._graph * tokens

    def fits(self, tokens: int, kept: float = 0.0) -> bool:
        """Returns True if a step can be computed while some bytes are kept. Returns free pages to the system if needed.

        Args:
            tokens: Tokens of the step, B * T.
            kept: Bytes to keep.
        """
        if self.limit is None:
            return True
        needed = kept + self._need(tokens)
        if self._resident() + needed <= self.limit:
            return True
        if self._freed:  # otherwise the system call would find nothing
            self._release()
            self._freed = False
        return self._resident() + needed <= self.limit

    def room(self, tokens: int, kept: int) -> Room:
        """Returns how much of a step may be kept: its graph, its input alone, or nothing.

        Args:
            tokens: Tokens of the step, B * T.
            kept: Bytes of the step that are kept in any case.
        """
        if self.fits(tokens, kept + self.graph(tokens)):
            return "graph"
        return "input" if self.fits(tokens, kept) else "none"
