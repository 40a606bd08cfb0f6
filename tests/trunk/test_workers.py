"""Two workers compute at the same time, each in order, and results come back to the thread that asked."""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

from fedsplit.trunk.workers import BACKWARD, FORWARD, WorkerThreads, run_until_defect


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


def test_closed_workers_end_after_the_calls_that_they_have() -> None:
    calls: queue.Queue[Callable[[], None]] = queue.Queue()
    workers, made = WorkerThreads([FORWARD], 1, calls.put), list[Any]()
    for compute in (threading.current_thread, lambda: 2):
        workers.start(FORWARD, compute, made.append)
    workers.close()
    posted(calls, 2)
    assert made[1] == 2
    made[0].join(60)
    assert not made[0].is_alive()


def test_work_is_repeated_until_it_is_over() -> None:
    done: list[int] = []
    threads = torch.get_num_threads()
    run_until_defect(lambda: done.append(len(done)), threads, lambda: len(done) == 3)
    assert done == [0, 1, 2]


def test_a_defect_ends_the_process() -> None:
    """No client may wait for a thread that is gone."""
    code = (
        "from fedsplit.trunk.workers import run_until_defect; import threading\n"
        "thread = threading.Thread(target=run_until_defect, args=(lambda: 1 / 0, 1))\n"
        "thread.start(); thread.join()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
