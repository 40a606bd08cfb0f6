"""Flower's engine in a thread: what ends it, and who may interrupt it; real processes that stop answering."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import flwr.simulation
import psutil
import pytest
from flwr.serverapp import ServerApp

from fedsplit.engines import flower_engine


class Federation:
    """The part of a federation that the engine's thread needs."""

    def __init__(self) -> None:
        self.stop = threading.Event()


def test_what_ends_the_engine_ends_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("no luck")

    monkeypatch.setattr(flwr.simulation, "run_simulation", broken)
    federation = Federation()
    with pytest.raises(ValueError, match="no luck"):
        flower_engine.simulate(federation, ServerApp(), 2)
    assert federation.stop.is_set()


def test_an_interrupt_is_heard_while_the_engine_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation()

    def hangs(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(60)

    monkeypatch.setattr(flower_engine, "_END_SECONDS", 0.1)
    monkeypatch.setattr(flwr.simulation, "run_simulation", hangs)
    with pytest.raises(KeyboardInterrupt):
        flower_engine.simulate(federation, ServerApp(), 2)
    assert federation.stop.is_set()


def run_and_freeze(name: str, cwd: Path, *argv: str) -> tuple[int, str, str]:
    """Runs the command, and in round 1 stops a process, whose name begins so, without killing it."""
    call = [sys.executable, "-m", "fedsplit.simulate", "--clients", "3", "--rounds", "2", "--train.steps", "300"]
    call += ["--batch-size", "2", "--max-length", "32", "--eval.samples", "4", "--lora-rank", "2", "--out", "run"]
    with subprocess.Popen([*call, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd) as run:
        assert run.stdout is not None and run.stderr is not None
        shown = ""
        for line in run.stdout:
            shown += line
            if line.startswith("round 0/2"):
                _freeze(psutil.Process(run.pid), name)
        return run.wait(timeout=300), shown, run.stderr.read()


def _freeze(parent: psutil.Process, name: str) -> None:
    while True:
        for process in parent.children(recursive=True):
            if " ".join(process.cmdline()).startswith(name):
                process.suspend()
                return


@pytest.mark.slow
def test_a_client_process_that_stops_answering_costs_its_client_the_round(tmp_path: Path) -> None:
    code, shown, error = run_and_freeze("ray::ClientAppActor.run", tmp_path, "--timeout", "60", "--train.steps", "60")
    assert (code, error) == (0, ""), shown
    assert "failed and is left out" in shown
    failed = json.loads((tmp_path / "run" / "summary.json").read_text())["client_rounds"]
    assert failed["asked"] == 6 and failed["failed"] >= 1
    assert f"{failed['failed']} of 6 client-rounds failed" in shown


@pytest.mark.slow
def test_a_trunk_that_stops_answering_ends_the_run_with_one_line(tmp_path: Path) -> None:
    code, _, error = run_and_freeze("ray::TrunkActor", tmp_path, "--timeout", "60")
    assert (code, error) == (1, "fedsplit: the trunk's process has not answered for 60 seconds\n")
