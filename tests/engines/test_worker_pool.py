"""The pool of workers on a Ray of its own: work is done, the dead are replaced, and nothing waits for ever."""

from __future__ import annotations

import os
import queue
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray

from fedsplit.engines.worker_pool import NoWorkers, Work, WorkerLost, WorkerPool

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def _ray() -> Iterator[None]:
    """A Ray on the loopback interface; what workers load is defined in this module, which they cannot import."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    yield
    ray.shutdown()


@pytest.fixture
def pool(_ray: None) -> Iterator[Callable[[Callable[[], Any]], WorkerPool]]:
    pools = []

    def make(load: Callable[[], Any], size: int = 2) -> WorkerPool:
        pools.append(WorkerPool(size, load, cpus=0.5))
        return pools[-1]

    yield make
    for each in pools:
        each.close()


def results(pool: WorkerPool, *tasks: Any) -> Iterator[Any]:
    """Yields the results as they come."""
    arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for task in tasks:
        pool.submit(Work((task,), arrived.put))
    for _ in tasks:
        yield arrived.get(timeout=60)


def obedient() -> Callable[[Any], Any]:
    def play(task: Any) -> Any:
        match task:
            case "pid":
                return os.getpid()
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "fail":
                raise ValueError("no luck")
            case "rest":
                time.sleep(0.2)
                return os.getpid()
        return task

    return play


def test_all_work_is_done_by_all_workers(pool: Any) -> None:
    made = pool(obedient)
    assert sorted(results(made, *range(20))) == list(range(20))
    assert len(set(results(made, *["rest"] * 8))) == 2


def test_a_worker_that_dies_is_replaced_and_its_work_told_lost(pool: Any) -> None:
    made = pool(obedient)
    before = set(results(made, *["rest"] * 8))
    found = list(results(made, "die", "die", "die", 1, 2, 3))
    assert sum(isinstance(each, WorkerLost) for each in found) == 3
    assert sorted(each for each in found if isinstance(each, int)) == [1, 2, 3]
    assert len(set(results(made, *["rest"] * 8))) == 2
    assert not before & set(results(made, *["pid"] * 8)) or len(before) < 2


def test_an_error_of_the_work_is_its_result_and_the_worker_lives(pool: Any) -> None:
    made = pool(obedient, 1)
    (before,) = results(made, "pid")
    (error,) = results(made, "fail")
    assert isinstance(error, ValueError) and "no luck" in str(error)
    assert list(results(made, "pid")) == [before]


def test_a_worker_that_has_stopped_is_killed_and_replaced(pool: Any) -> None:
    made = pool(obedient, 1)
    list(results(made, "pid"))
    arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
    made.submit(Work(("stop",), arrived.put))
    time.sleep(1)
    made.kill_busy()
    assert isinstance(arrived.get(timeout=60), WorkerLost)
    assert list(results(made, "still there")) == ["still there"]


def test_workers_that_die_as_they_start_end_the_attempts(pool: Any) -> None:
    def broken() -> Any:
        raise ImportError("a library is missing")

    made = pool(broken, 1)
    found = list(results(made, 1, 2, 3))
    assert isinstance(found[-1], NoWorkers) and "a library is missing" in str(found[-1])


def test_the_end_does_not_wait_for_work(pool: Any) -> None:
    made = pool(obedient, 1)
    list(results(made, "pid"))
    arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
    made.submit(Work(("stop",), arrived.put))
    time.sleep(1)
    made.close()
    assert isinstance(arrived.get(timeout=60), WorkerLost)
