"""Runs with processes: what is killed or stops answering changes no byte of the result, nor does the engine."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import psutil
import pytest
from watched_runs import WatchedRun, adapters

RUN = ["--clients", "3", "--rounds", "2", "--train.steps", "60", "--batch-size", "2", "--max-length", "32"]
RUN += ["--eval.samples", "4", "--lora-rank", "2", "--deterministic", "--workers", "2", "--out", "run"]


WORKER, TRUNK = "ray::ClientWorker", "ray::TrunkActor"

FLOWERS_WORKER = "ray::ClientAppActor"


class Watched(WatchedRun):
    """The command, whose processes a test kills or stops as its lines are shown."""

    def __init__(self, cwd: Path, *argv: str) -> None:
        super().__init__(cwd, *RUN, *argv)

    def processes(self, name: str) -> list[psutil.Process]:
        """Returns the processes of the run whose command line begins so, once there is one."""
        while self.poll() is None:
            found = []
            for process in psutil.Process(self.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if " ".join(process.cmdline()).startswith(name):
                        found.append(process)
            if found:
                return found
        raise AssertionError(f"the command has ended:\n{self.shown}")

    def end(self, seconds: float | None = 400) -> tuple[int, str]:
        """Waits for the end, but not for ever."""
        return super().end(seconds)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The adapter and the last checkpoint of the run in which nothing dies."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with Watched(folder) as run:
        assert run.end() == (0, "")
    return adapters(folder / "run")


@pytest.mark.slow
@pytest.mark.parametrize("victims", ["one worker", "all workers", "trunk and workers"])
def test_the_run_is_the_same_to_the_bit_whatever_is_killed(
    victims: str, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    with Watched(tmp_path) as run:
        run.wait_for("round 1/2")
        doomed = []
        if "worker" in victims:
            workers = run.processes(f"{WORKER}.play")
            doomed += workers[:1] if victims == "one worker" else [*workers, *run.processes(WORKER)]
        if "trunk" in victims:
            doomed += run.processes(TRUNK)
        for process in doomed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        assert run.end() == (0, ""), run.shown
    assert adapters(tmp_path / "run") == undisturbed
    assert "round 2/2 is played again" in run.shown
    assert "client-rounds failed" not in run.shown


@pytest.mark.slow
@pytest.mark.parametrize("victim", [f"{WORKER}.play", TRUNK])
def test_a_process_that_stops_answering_is_replaced(victim: str, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    with Watched(tmp_path, "--timeout", "20") as run:
        run.wait_for("round 1/2")
        run.processes(victim)[0].suspend()
        assert run.end() == (0, ""), run.shown
    assert adapters(tmp_path / "run") == undisturbed
    assert "round 2/2 is played again" in run.shown


@pytest.mark.slow
def test_a_run_that_is_given_up_leaves_the_last_round_that_counts(tmp_path: Path) -> None:
    with Watched(tmp_path, "--max-failures", "0") as run:
        run.wait_for("round 1/2")
        run.processes(TRUNK)[0].kill()
        code, error = run.end()
    assert code == 3, run.shown
    assert error.startswith("fedsplit: the run ended early: round 2 was lost once: the trunk's process is gone")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["complete"], summary["last_round"], summary["adapter_round"]) == (False, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_flowers_own_engine_gives_the_same_bytes(killed: bool, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    with Watched(tmp_path, "--engine", "flower") as run:
        run.wait_for("round 1/2")
        if killed:
            run.processes(f"{FLOWERS_WORKER}.run")[0].kill()
        assert run.end() == (0, ""), run.shown
    assert adapters(tmp_path / "run") == undisturbed
    assert ("round 2/2 is played again" in run.shown) == killed
