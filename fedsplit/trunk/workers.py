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
        compute: Function for the long part. Must not change shared state, since a forward and a backward may be
            computed at the same time.
        finish: Function that turns the result of `compute` into answers. Must run on the thread that began the work.

    Example:
        >>> work = Work(compute=lambda: 6 * 7, finish=lambda result: [f"answer {result}"])
        >>> work.done()
        ['answer 42']
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
    """Computes on further threads, while the calling thread goes on."""

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


def run_until_defect(work: Callable[[], object], threads: int, is_over: Callable[[], bool] = lambda: False) -> None:
    """Repeats some work, by default for ever. An exception that escapes the work ends the process.

    The exception is a defect of the trunk. Clients notice the end of a process, and give up. If only a thread ended,
    clients would wait for the thread's answers for ever.

    Args:
        work: Function for one piece of work, such as a call from a queue.
        threads: Number of threads that torch may use for the work.
        is_over: Returns True to end before the next piece of work.
    """
    torch.set_num_threads(threads)  # OpenMP keeps a number for each calling thread
    try:
        while not is_over():
            work()
    except BaseException:  # noqa: BLE001  # whatever it is, clients must not wait for this thread
        traceback.print_exc()
        os._exit(1)  # `sys.exit` would end this thread alone


_Call = tuple[Callable[[], Any], Callable[[Any], None]]
"""A computation, and a function that takes the result."""


class WorkerThreads:
    """Threads by name. Each thread has a queue, and computes the calls of the queue in order."""

    def __init__(self, names: Iterable[str], threads: int, post: Callable[[Callable[[], None]], None]) -> None:
        """Starts the threads. The threads end with the process, or by `close`.

        Args:
            names: Names of the workers.
            threads: Number of threads that torch may use in each thread.
            post: Function that hands a call to the calling thread.
        """
        self._post = post
        self._is_closed = False
        self._queues: dict[str, queue.SimpleQueue[_Call | None]] = {}
        for name in names:
            self._queues[name] = queue.SimpleQueue()
            work = functools.partial(self._compute_next, name)
            thread = threading.Thread(
                target=run_until_defect,
                args=(work, threads, functools.partial(self._is_over, name)),
                name=name,
                daemon=True,  # a computation must not keep an ending process alive
            )
            thread.start()

    def _is_over(self, name: str) -> bool:
        """Returns True once a worker has done all calls that came before the end."""
        return self._is_closed and self._queues[name].empty()

    def _compute_next(self, name: str) -> None:
        """Computes one call.

        A loop in here would keep the last result alive, with a graph of many megabytes, while the thread waits.
        """
        call = self._queues[name].get()
        if call is None:  # closed
            return
        compute, done = call
        result = outcome(compute)
        self._post(lambda: done(result))

    def start(self, worker: str, compute: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """Queues a computation for a worker. The call of `done` is posted to the calling thread."""
        self._queues[worker].put((compute, done))

    def close(self) -> None:
        """Ends the threads after the calls that they have."""
        self._is_closed = True
        for waiting in self._queues.values():
            waiting.put(None)
