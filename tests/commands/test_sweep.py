"""`fedsplit sweep`."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas
import psutil
import pytest
import warm_command

from fedsplit.commands.sweep import Progress, main
from fedsplit.studies.run_measures import LOSS

BASE = """
seeds = [7]
baseline = "fedavg"
[settings]
clients = 2
rounds = 2
train.steps = 2
eval.samples = 2
max_failures = 0
"""

STUDY = """
extends = "base.toml"
seeds = [0, 1]
[grid]
strategy = ["fedavg", "fedex", "{mine}:Raises", "{mine}:Dies"]
"""

MINE = """
import os, signal
class Raises:
    def init(self, adapters):
        return {}
    def aggregate(self, state, adapters, updates):
        if updates[0].tokens != 64:  # not on a trial
            self.fail()
        return state, updates[0].adapters
    def fail(self):
        raise RuntimeError("no luck")
class Dies(Raises):
    def fail(self):
        os.kill(os.getpid(), signal.SIGKILL)
"""


def sha(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter/adapter_model.safetensors").read_bytes()).hexdigest()


def command(*words: object) -> subprocess.CompletedProcess[str]:
    return warm_command.command("fedsplit", *words, cwd=Path.cwd())


@pytest.mark.slow
def test_runs_equal_those_of_simulate_and_failures_stay_alone(tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(MINE)
    study = tmp_path / "study.toml"
    study.write_text(STUDY.format(mine=mine))
    (tmp_path / "base.toml").write_text(BASE)
    out = tmp_path / "out"
    done = command("sweep", study, "--out", out, "--jobs", 2)
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith(f"8 runs in {out}\n")
    errors = done.stderr.splitlines()
    assert len(errors) == 4 and sum("no luck (mine.py, line " in line for line in errors) == 2
    assert sum("Dies, seed" in line and "its process was killed" in line for line in errors) == 2

    # The same settings by the command, in a process of its own, give the same adapter to the bit.
    for name in ("fedavg-seed-1-", "fedex-seed-1-"):
        (run,) = (out / "runs").glob(f"{name}*")
        alone = tmp_path / name
        again = command("simulate", "--config", run / "config.toml", "--out", alone)
        assert again.returncode == 0 and sha(alone) == sha(run)

    table = pandas.read_parquet(out / "table.parquet")
    assert set(table.strategy) == {"fedavg", "fedex"} and set(table.seed) == {0, 1} and set(table["round"]) == {0, 1, 2}
    document = json.loads((out / "comparison.json").read_text())
    assert document["study"]["settings"]["clients"] == 2 and document["versions"]["torch"]
    (test,) = [line for line in document["comparison"] if line["test"] and line["measure"] == LOSS]
    assert test["label"] == "fedex" and test["test"]["pairs"] == 2

    # What is finished is not played again; what failed is. The copy of the study is the same study.
    mine.write_text(MINE.replace("self.fail()", "pass"))
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").glob("fed*/summary.json")}
    done = command("sweep", out / "study.toml", "--out", out, "--jobs", 2)
    assert done.returncode == 0, done.stderr
    assert "8 runs in" in done.stdout and "4 of them finished before" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").glob("fed*/summary.json")} == before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_sweep_leaves_no_process_and_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    study = tmp_path / "study.toml"
    study.write_text("[settings]\nclients = 2\nrounds = 12\ntrain.steps = 2\neval.samples = 2\neval.every = 12\n")
    out = tmp_path / "out"
    arguments = [sys.executable, "-m", "fedsplit", "sweep", str(study), "--out", str(out)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 120
        while not list(out.glob("runs/*/checkpoints/round-0002")):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        workers = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, number)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    _, alive = psutil.wait_procs(workers, timeout=15)
    assert not alive
    assert process.returncode == (130 if number == signal.SIGINT else -9)
    if number == signal.SIGINT:
        assert re.search(r"stopped; 0 of 1 runs have ended; fedsplit sweep \S+ --out \S+ goes on", errors)

    done = command("sweep", study, "--out", out)
    assert done.returncode == 0 and "1 of them stopped before and going on" in done.stdout
    (run,) = (out / "runs").iterdir()
    alone = tmp_path / "alone"
    assert command("simulate", "--config", run / "config.toml", "--out", alone).returncode == 0
    assert sha(alone) == sha(run)


def test_errors_of_all_runs_come_together_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = tmp_path / "study.toml"
    study.write_text(
        'baseline = "fedprox"\n[settings]\ntrian.steps = 2\n[grid]\nclients = [2, 0]\nstrategy = ["fedavg", "krum"]'
    )
    assert main([str(study), "--out", str(tmp_path / "out"), "--dry-run"]) == 2
    lines = capsys.readouterr().err.splitlines()
    baseline, misspelt, too_few, none = lines
    assert "baseline: fedprox" in baseline and misspelt.startswith("fedsplit: there is no setting trian; did you mean")
    assert too_few.endswith("(in clients 2, krum, seed 0)")
    assert none.endswith("(in clients 0, fedavg, seed 0 and clients 0, krum, seed 0)")
    assert not (tmp_path / "out").exists()


def test_two_points_that_are_one_run_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = tmp_path / "study.toml"
    study.write_text('[[variants]]\nname = "a"\n[[variants]]\nname = "b"\nrounds = 5\n')
    assert main([str(study), "--out", str(tmp_path / "out"), "--dry-run"]) == 2
    assert "its settings are those of the run a, seed 0" in capsys.readouterr().err


def test_a_process_is_added_when_the_measured_memory_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedsplit.trunk import memory

    progress = Progress(3)
    monkeypatch.setattr(memory, "free_memory", lambda: 100)
    assert not progress.may_grow(), "nothing is measured yet"
    progress.learn({"peak_memory": {"client": 80, "trunk": 80}})
    assert progress.may_grow()
    progress.learn({"peak_memory": {"client": 81, "trunk": 81}})
    assert not progress.may_grow()
