"""The pool of warm processes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from fedsplit.studies.warm_pool import Job, Workers

warmed = 0


def warm() -> None:
    global warmed
    warmed += 1


def work(task: str) -> tuple[int, int]:
    print("working on", task, flush=True)
    if task == "raise":
        raise ValueError("no luck")
    if task == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "sleep":
        time.sleep(60)
    return os.getpid(), warmed


def describe(error: BaseException) -> str:
    return str(error)


def pool(most: int) -> Workers:
    return Workers(work, warm, describe, most)


def test_one_process_plays_all_runs_and_those_that_fail_fail_alone(tmp_path: Path) -> None:
    tasks = ["one", "raise", "two", "die", "three"]
    jobs = [Job(str(number), task, tmp_path / f"{task}.log") for number, task in enumerate(tasks)]
    with pool(1) as workers:
        workers.start_first()
        workers.start_first()
        outcomes = list(workers.play(jobs))
    one, raised, two, died, three = sorted(outcomes, key=lambda outcome: outcome.name)
    assert one.value == two.value and one.value[1] == 1, "the process is warmed once"
    assert raised.error == "no luck" and raised.value is None
    assert "its process was killed, as the system does when memory runs out" in died.error
    assert three.value[0] != one.value[0]
    assert (tmp_path / "two.log").read_text() == "working on two\n"


def test_leaving_the_pool_ends_runs_at_once(tmp_path: Path) -> None:
    with pool(2) as workers:
        outcomes = workers.play([Job(task, task, tmp_path / "log") for task in ("sleep", "one")])
        assert next(outcomes).name == "one"
        processes = [worker.process for worker in workers._workers]
        assert len(processes) == 2
    assert not any(process.is_alive() for process in processes)


def test_processes_are_added_only_where_there_is_memory(tmp_path: Path) -> None:
    jobs = [Job(str(number), "one", tmp_path / "log") for number in range(4)]
    with pool(2) as workers:
        workers.may_grow = lambda: False
        assert len({outcome.value[0] for outcome in workers.play(jobs)}) == 1
