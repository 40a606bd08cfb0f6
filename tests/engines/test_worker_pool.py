"""The pool of workers on a Ray of its own: work is done, the dead are replaced, and nothing waits for ever."""

from __future__ import annotations

import os
import queue
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from fedsplit.engines import worker_pool
from fedsplit.engines.worker_pool import NoWorkers, Place, WorkerLost, WorkerPool

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("worker pool")]  # one process starts Ray


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
        pools.append(WorkerPool(lambda: size, load, {"num_cpus": 0.5}))
        return pools[-1]

    yield make
    for each in pools:
        each.close()
    for each in pools:
        each.join()
        assert not any(worker.is_alive() for worker in each._workers), "a thread may call a Ray that is shut down"


class Task:
    """Work whose argument is a word; remembers where it was done."""

    can_be_early = True

    def __init__(self, word: Any, arrived: queue.SimpleQueue[Any], home: str = "") -> None:
        self._word = word
        self.home = home
        self._arrived = arrived
        self.places: list[Place] = []

    def suits(self, place: Place) -> bool:
        return self._word != "unsuitable"

    def arguments(self, place: Place) -> tuple[Any, ...]:
        if self._word == "refuse":
            raise OSError("the disk cannot be read")
        self.places.append(place)
        return (self._word,)

    def done(self, place: Place, result: Any) -> None:
        self.places.append(place)
        self._arrived.put(result)


def results(pool: WorkerPool, *words: Any) -> Iterator[Any]:
    """Yields the results as they come."""
    arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for word in words:
        pool.submit(Task(word, arrived))
    for _ in words:
        yield arrived.get(timeout=60)


def obedient() -> Callable[[Any], Any]:
    def play(task: Any) -> Any:
        match task:
            case "pid":
                return os.getpid()
            case "die":
                time.sleep(0.2)  # Ray sends the result of the work before while this work runs
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
    made.wait_for_places(2, 60)
    assert sorted(results(made, *range(20))) == list(range(20))
    assert len(set(results(made, *["rest"] * 8))) == 2


class Noted(Task):
    """Work that notes when its arguments are made, and when its result comes."""

    def __init__(self, word: Any, notes: list[str], can_be_early: bool) -> None:
        self.arrivals: queue.SimpleQueue[Any] = queue.SimpleQueue()
        super().__init__(word, self.arrivals)
        self.can_be_early = can_be_early
        self._notes = notes

    def arguments(self, place: Place) -> tuple[Any, ...]:
        self._notes.append(f"{self._word} begins")
        return super().arguments(place)

    def done(self, place: Place, result: Any) -> None:
        self._notes.append(f"{self._word} ends")
        super().done(place, result)


@pytest.mark.parametrize(
    ("can_be_early", "expected"),
    [
        (True, ["rest begins", "b begins", "rest ends", "b ends", "c begins", "c ends"]),
        (False, ["rest begins", "rest ends", "b begins", "b ends", "c begins", "c ends"]),
    ],
)
def test_a_busy_worker_gets_its_next_work_early_if_the_work_allows_it(
    can_be_early: bool, expected: list[str], pool: Any
) -> None:
    made = pool(obedient, 1)
    list(results(made, "pid"))
    notes: list[str] = []
    tasks = [Noted(word, notes, can_be_early) for word in ("rest", "b", "c")]
    with made._changed:  # the worker sees all at once
        for task in tasks:
            made.submit(task)
    for task in tasks:
        task.arrivals.get(timeout=60)
    assert notes == expected


def test_no_worker_takes_early_what_another_could_begin(pool: Any) -> None:
    """Three pieces of work for two workers: the third goes to the worker that is free first."""
    made = pool(obedient)
    made.wait_for_places(2, 60)
    notes: list[str] = []
    tasks = [Noted(word, notes, True) for word in ("rest", "rest", "c")]
    with made._changed:
        for task in tasks:
            made.submit(task)
    for task in tasks:
        task.arrivals.get(timeout=60)
    assert notes.index("c begins") > notes.index("rest ends")


def test_a_worker_that_dies_is_replaced_and_its_work_told_lost(pool: Any) -> None:
    made = pool(obedient)
    before = set(results(made, *["rest"] * 8))
    found = list(results(made, "die", "die", "die", 1, 2, 3))
    assert sum(isinstance(each, WorkerLost) for each in found) == 3
    assert sorted(each for each in found if isinstance(each, int)) == [1, 2, 3]
    made.wait_for_places(2, 60)
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
    made.submit(Task("stop", arrived))
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
    made.submit(Task("stop", arrived))
    time.sleep(1)
    made.close()
    assert isinstance(arrived.get(timeout=60), WorkerLost)


def test_work_is_told_where_it_is_done(pool: Any) -> None:
    made = pool(obedient, 1)
    arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
    task = Task("pid", arrived)
    made.submit(task)
    pid = arrived.get(timeout=60)
    here = Place(ray.get_runtime_context().get_node_id(), pid, ray.util.get_node_ip_address())
    assert task.places == [here] * 2 == made.places() * 2


def test_work_that_suits_the_place_is_preferred_and_the_other_is_done_too(pool: Any) -> None:
    made = pool(obedient, 1)
    list(results(made, "pid"))
    assert list(results(made, "rest", "unsuitable", 1, 2))[1:] == [1, 2, "unsuitable"]


def test_arguments_that_cannot_be_made_are_an_error_of_the_work_alone(pool: Any) -> None:
    made = pool(obedient, 1)
    (error,) = results(made, "refuse")
    assert isinstance(error, OSError)
    assert list(results(made, 7)) == [7]


def test_workers_that_find_no_room_hold_up_nobody_and_join_later(pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with two runs on one cluster: work is taken by workers that have their place."""
    monkeypatch.setattr(worker_pool, "_GROW_SECONDS", 0.0)
    room = [1]
    made = WorkerPool(lambda: room[0], obedient, {"num_cpus": 1.2})  # of two CPUs: room for one worker
    try:
        assert made.wait_for_places(1, 60) == 1
        room[0] = 2
        made.grow()
        assert sorted(results(made, *range(6))) == list(range(6))
        assert made.wait_for_places(2, 0.1) == 1
    finally:
        made.close()


def test_workers_give_up_their_room_and_come_back(pool: Any) -> None:
    made = pool(obedient)
    before = set(results(made, *["rest"] * 8))
    with made.away():
        assert made.places() == []
        until = time.monotonic() + 60
        while ray.available_resources()["CPU"] < 2 and time.monotonic() < until:
            time.sleep(0.05)
        later = results(made, "later")
        time.sleep(1)
        assert made.places() == []
        assert ray.available_resources()["CPU"] == 2
    assert list(later) == ["later"]
    after = set(results(made, *["rest"] * 8))
    assert len(after) == 2 and not before & after


def test_work_with_a_home_waits_for_a_worker_there_and_holds_up_no_other(pool: Any) -> None:
    made = pool(obedient, 1)
    here = ray.get_runtime_context().get_node_id()
    arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for word, home in (("far", "another node"), ("near", here), ("any", "")):
        made.submit(Task(word, arrived, home))
    assert [arrived.get(timeout=60) for _ in range(2)] == ["near", "any"]
    assert arrived.empty()


def test_work_of_a_node_that_is_not_there_fails_and_the_rest_is_done(_ray: None) -> None:
    """A worker of a node that is lost takes the work of that node alone."""
    here, lost = ray.get_runtime_context().get_node_id(), "1" * 56
    made = WorkerPool(lambda: 2, obedient, {"num_cpus": 0.5}, [here, lost])
    try:
        arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        made.submit(Task("far", arrived, lost))
        assert isinstance(arrived.get(timeout=60), NoWorkers)
        assert list(results(made, *range(4))) == list(range(4))
        assert [place.node for place in made.places()] == [here]
    finally:
        made.close()


def test_places_are_in_the_order_of_addresses() -> None:
    made = WorkerPool(lambda: 0, obedient, {})
    places = [
        Place("a", 1, "10.0.0.10"),
        Place("c", 9, "10.0.0.9"),
        Place("b", 2, "10.0.0.10"),
        Place("c", 8, "10.0.0.9"),
    ]
    made._workers = [SimpleNamespace(place=place) for place in (*places, None)]  # type: ignore[misc]
    assert made.places() == [places[3], places[1], places[0], places[2]]
