"""Worker threads of the trunk: one computes forwards while another computes backwards."""

from __future__ import annotations

import functools
import os
import queue
import threading
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fedsplit.wire.packets import Packet

FORWARD, BACKWARD = "forward", "backward"
"""Names of the two workers."""


@dataclass(frozen=True)
class Work:
    """A forward or backward that has begun.

    Attributes:
        compute: Does the long part, and changes nothing that another thread sees: one forward and one backward may be
            computed at the same time.
        finish: Turns the result of `compute` into answers; must run on the thread that began the work.
    """

    compute: Callable[[], Any]
    finish: Callable[[Any], list[Packet]]

    @classmethod
    def answered(cls, answers: list[Packet]) -> Work:
        """Returns work with nothing to compute."""
        return cls(lambda: None, lambda _: answers)

    def done(self) -> list[Packet]:
        """Does all of the work here and now, and returns the answers."""
        return self.finish(self.compute())


class Workers(Protocol):
    """Computes elsewhere, while the thread that asked goes on."""

    def start(self, worker: str, compute: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """Starts a computation on a worker, and calls `done` with the result or the exception."""
        ...


def outcome(compute: Callable[[], Any]) -> Any:
    """Returns the result of a computation, or its exception.

    Example:
        >>> outcome(lambda: 1 + 1), outcome(lambda: 1 / 0)
        (2, ZeroDivisionError('division by zero'))
    """
    try:
        return compute()
    except Exception as error:  # noqa: BLE001  # the caller hands it on
        return error


def run_until_defect(work: Callable[[], object], threads: int) -> None:
    """Repeats some work for ever; if an exception escapes it, ends the process.

    The exception is a defect of the trunk. Clients see a process that is gone, and give up; for answers of a thread
    that is gone they would wait for ever.

    Args:
        work: Function that does one piece of work, such as a call from a queue.
        threads: Number of threads that torch may use for the work.
    """
    torch.set_num_threads(threads)  # OpenMP keeps the number separately for each thread that asks
    try:
        while True:
            work()
    finally:
        traceback.print_exc()
        os._exit(1)


class WorkerThreads:
    """Threads by name. Each thread computes the calls in its queue, in order."""

    def __init__(self, names: Iterable[str], threads: int, post: Callable[[Callable[[], None]], None]) -> None:
        """Starts the threads; they end with the process.

        Args:
            names: Names of the workers.
            threads: Number of threads that torch may use in each thread.
            post: Hands a call to the thread that asked.
        """
        self._post = post
        self._queues: dict[str, queue.SimpleQueue[tuple[Callable[[], Any], Callable[[Any], None]]]] = {}
        for name in names:
            self._queues[name] = queue.SimpleQueue()
            work = functools.partial(self._compute_next, name)
            threading.Thread(target=run_until_defect, args=(work, threads), name=name, daemon=True).start()

    def _compute_next(self, name: str) -> None:
        """Computes once; returning drops all references, so that nothing is kept while the thread waits."""
        compute, done = self._queues[name].get()
        result = outcome(compute)
        self._post(lambda: done(result))

    def start(self, worker: str, compute: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """Queues a computation for a worker; `done` is posted to the thread that asked."""
        self._queues[worker].put((compute, done))
