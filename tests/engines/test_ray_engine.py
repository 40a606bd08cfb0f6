"""Runs with processes: what is killed or stops answering changes no byte of the result, nor does the engine."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from watched_runs import WatchedRun, adapters

from fedsplit import shutdown
from fedsplit.engines import ray_engine
from fedsplit.engines.planning import Plan
from fedsplit.objects import NOTHING
from fedsplit.settings.documents import build

pytestmark = pytest.mark.xdist_group("ray engine")  # one process plays the run in which nothing dies

RUN = ["--clients", "3", "--rounds", "2", "--train.steps", "60", "--batch-size", "2", "--max-length", "32"]
RUN += ["--eval.samples", "4", "--lora-rank", "2", "--deterministic", "--workers", "2", "--out", "run"]


WORKER, TRUNK = "ray::ClientWorker", "ray::TrunkActor"

FLOWERS_WORKER = "ray::ClientAppActor"

SECONDS = 120.0
"""Longest wait for a process."""


class Watched(WatchedRun):
    """The command, whose processes a test kills or stops as its lines are shown."""

    def __init__(self, cwd: Path, *argv: str) -> None:
        super().__init__(cwd, *RUN, *argv)

    def processes(self, name: str) -> list[psutil.Process]:
        """Returns the processes of the run whose command line begins so, once there is one."""
        until = time.monotonic() + SECONDS
        lines: dict[int, str] = {}
        while self.poll() is None and time.monotonic() < until:
            found = []
            for process in psutil.Process(self.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    lines[process.pid] = " ".join(process.cmdline())
                    if lines[process.pid].startswith(name):
                        found.append(process)
            if found:
                return found
            time.sleep(0.01)
        raise AssertionError(f"the command has ended, or has no process {name}: {lines}\n{self.shown}")

    def end(self, seconds: float | None = 400) -> tuple[int, str]:
        """Waits for the end, but not for ever."""
        return super().end(seconds)


def test_a_session_that_does_not_close_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Event()

    class Session:
        def __init__(self, *_: Any) -> None:
            pass

        def close(self) -> None:
            asked.set()
            threading.Event().wait()

    monkeypatch.setattr(shutdown, "CLOSING_SECONDS", 0.1)
    monkeypatch.setattr(ray_engine, "RaySession", Session)
    with ray_engine._session(build({}), Plan(2, 1, 3, 1, 2), NOTHING):
        assert not asked.is_set()
    assert asked.wait(60)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The adapter and the last checkpoint of the run in which nothing dies."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with Watched(folder) as run:
        assert run.end() == (0, "")
    return adapters(folder / "run")


AGAIN = "round 2/2 is played again"
"""Beginning of the line after which a test looks for its next victim. One run has several, since a start takes long."""


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.mark.slow
def test_the_run_is_the_same_to_the_bit_whatever_is_killed(undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    """All processes of clients in the first round; in the second one, all of them with the trunk's.

    A client that loses three processes in one round has failed: so the losses are in different rounds.
    """
    with Watched(tmp_path) as run:
        run.wait_for("round 0/2")
        kill([*run.processes(f"{WORKER}.play"), *run.processes(WORKER)])
        run.wait_for("round 1/2  training loss")
        assert "round 1/2 is played again" in run.shown
        kill([*run.processes(f"{WORKER}.play"), *run.processes(WORKER), *run.processes(TRUNK)])
        run.wait_for(AGAIN)
        assert run.end() == (0, ""), run.shown
    assert adapters(tmp_path / "run") == undisturbed
    assert "client-rounds failed" not in run.shown


@pytest.mark.slow
def test_a_trunk_in_stages_gives_the_same_bytes_also_if_stages_are_killed(
    undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """The first round is undisturbed."""
    with Watched(tmp_path, "--trunk.stages", "1:2:5") as run:
        for killed, line in enumerate(("round 1/2", AGAIN)):
            with run.halted(line):
                assert AGAIN not in run.shown or killed
                stages = run.processes(TRUNK)
                assert len(stages) == 2
                stages[killed].kill()
        run.wait_for(AGAIN)
        assert run.end() == (0, ""), run.shown
    assert adapters(tmp_path / "run") == undisturbed
    assert "between stages" in run.shown


@pytest.mark.slow
def test_processes_that_stop_answering_are_replaced(undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    """One of the clients' processes, while the others go on; then the trunk's."""
    with Watched(tmp_path, "--timeout", "20") as run:
        for victim, line in ((f"{WORKER}.play", "round 1/2"), (TRUNK, AGAIN)):
            run.wait_for(line)
            run.processes(victim)[0].suspend()
        run.wait_for(AGAIN)
        assert run.end() == (0, ""), run.shown
    assert adapters(tmp_path / "run") == undisturbed


@pytest.mark.slow
def test_a_run_that_is_given_up_leaves_the_last_round_that_counts(tmp_path: Path) -> None:
    with Watched(tmp_path, "--max-failures", "0") as run:
        with run.halted("round 1/2"):
            run.processes(TRUNK)[0].kill()
        code, error = run.end()
    assert code == 3, run.shown
    assert error.startswith("fedsplit: the run ended early: round 2 was lost once: the trunk's process is gone")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["complete"], summary["last_round"], summary["adapter_round"]) == (False, 1, 1)


@pytest.mark.slow
def test_flowers_own_engine_gives_the_same_bytes(undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    """The first round is undisturbed; in the second one, a client's process is killed."""
    with Watched(tmp_path, "--engine", "flower") as run:
        run.wait_for("round 1/2")
        run.processes(f"{FLOWERS_WORKER}.run")[0].kill()
        run.wait_for(AGAIN)
        assert run.end() == (0, ""), run.shown
    assert adapters(tmp_path / "run") == undisturbed
