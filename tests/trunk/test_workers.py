"""Two workers compute at the same time, each in order, and results come back to the thread that asked."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import torch

from fedsplit.trunk.workers import BACKWARD, FORWARD, WorkerThreads


def posted(calls: queue.Queue[Callable[[], None]], count: int) -> None:
    for _ in range(count):
        calls.get(timeout=10)()


def test_the_workers_compute_at_the_same_time() -> None:
    """Each waits, within its computation, for the other one to be there, too."""
    calls: queue.Queue[Callable[[], None]] = queue.Queue()
    workers, both, made = WorkerThreads([FORWARD, BACKWARD], 1, calls.put), threading.Barrier(2, timeout=10), []
    for worker in (FORWARD, BACKWARD):
        workers.start(worker, both.wait, made.append)
    assert made == []
    posted(calls, 2)
    assert sorted(made) == [0, 1]


def test_a_worker_keeps_the_order_and_tells_what_broke() -> None:
    calls: queue.Queue[Callable[[], None]] = queue.Queue()
    workers, made = WorkerThreads([FORWARD], 3, calls.put), list[Any]()

    def broken() -> None:
        raise MemoryError("no memory is left")

    for compute in (lambda: 1, broken, torch.get_num_threads, threading.current_thread):
        workers.start(FORWARD, compute, made.append)
    posted(calls, 4)
    assert made[0] == 1
    assert isinstance(made[1], MemoryError)
    assert made[2] == 3
    assert made[3].name == FORWARD
