"""Code of the user's that hangs ends the command with its name, through the real command line."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedsplit import watchdog
from fedsplit.commands import checks, model_checks, run_checks
from fedsplit.corpora import partition
from fedsplit.model import facts
from fedsplit.optimization import optim
from fedsplit.results import initial
from fedsplit.settings.documents import build

MINE = """
import time
import torch
from strategies.fedavg import FedAvg


class Strategy(FedAvg):
    def __init__(self, until):
        self.until = until

    def aggregate(self, state, adapters, updates):
        self.until -= 1
        if self.until < 0:
            time.sleep(600)
        return super().aggregate(state, adapters, updates)


def slow(logits, labels):
    time.sleep(600)


class Slow:
    def __init__(self):
        time.sleep(600)


class Objective:
    calls = 0

    def __call__(self, logits, labels):
        Objective.calls += 1
        if Objective.calls > 8:
            time.sleep(600)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
"""

TINY = ["--clients", "3", "--rounds", "4", "--train.steps", "2", "--batch-size", "2", "--max-length", "32"]
TINY += ["--eval.samples", "4", "--lora-rank", "2", "--out", "run"]

CASES = {
    "strategy in its trial": (
        ("--strategy", "mine.py:Strategy", "--strategy.until", "0", "--startup-deadline", "5"),
        "the strategy, in its trial round, has not returned for 5 seconds",
    ),
    "strategy in the run": (
        ("--strategy", "mine.py:Strategy", "--strategy.until", "2", "--timeout", "5"),
        "the strategy, which aggregates the updates of a round, has not returned for 5 seconds; the last checkpoint is "
        "run/checkpoints/round-0002: python -m fedsplit.simulate --resume run goes on",
    ),
    "objective in its trial": (
        ("--objective", "mine.py:slow", "--startup-deadline", "5"),
        "the objective or a metric, in its trial, has not returned for 5 seconds",
    ),
    "class that is made": (
        ("--metric", "mine.py:Slow", "--startup-deadline", "5"),
        "the user's code that the settings name has not returned for 5 seconds",
    ),
    "objective": (
        ("--objective", "mine.py:Objective", "--timeout", "5"),
        "client 2 has not returned for 5 seconds; the last checkpoint is "
        "run/checkpoints/round-0001: python -m fedsplit.simulate --resume run goes on",
    ),
    "objective in a thread": (
        (
            "--objective",
            "mine.py:Objective",
            "--timeout",
            "5",
            "--clients",
            "2",
            "--workers",
            "2",
            "--train.steps",
            "100",
        ),
        "client 0 or client 1 has not returned for 5 seconds",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_what_hangs_ends_the_command_with_its_name(case: str, tmp_path: Path) -> None:
    flags, words = CASES[case]
    (tmp_path / "mine.py").write_text(MINE)
    call = [
        sys.executable,
        "-m",
        "fedsplit.simulate",
        "--engine",
        "local",
        *TINY,
        *flags,
    ]  # a flag that comes twice counts as it comes last
    done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert (done.returncode, done.stderr) == (1, f"fedsplit: {words}\n"), done.stdout


def test_a_data_set_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def hangs(*_: object) -> None:
        time.sleep(600)

    monkeypatch.setattr(partition, "partition_of", hangs)
    monkeypatch.setattr(watchdog, "LOOK_SECONDS", 0.05)
    with pytest.raises(watchdog.Hung, match=r"^the data set has not returned for 1 seconds$"):
        run_checks.check(build({"startup_deadline": 1.0, "out": str(tmp_path / "run")}))


def test_our_own_work_does_not_count_against_the_code_of_the_user(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Imports of libraries and checks of our own may take any time."""
    now = 0.0

    def slow(work: Callable[..., Any]) -> Callable[..., Any]:
        def works(*arguments: Any) -> Any:
            nonlocal now
            now += 60.0
            signal.raise_signal(signal.SIGALRM)  # the look of a watchdog, should one be looking
            return work(*arguments)

        return works

    handler = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    try:
        monkeypatch.setattr(run_checks, "Watchdog", lambda seconds: watchdog.Watchdog(seconds, clock=lambda: now))
        slow_work = (
            (facts, "read_facts"),
            (checks, "check_training"),
            (optim, "check_optimizer"),
            (model_checks, "check_stacked"),
            (model_checks, "check_tokens"),
            (initial, "check_initial"),
        )
        for module, name in slow_work:
            monkeypatch.setattr(module, name, slow(getattr(module, name)))
        run_checks.check(build({"startup_deadline": 1.0, "out": str(tmp_path / "run")}))
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert now >= 60.0 * len(slow_work)
