"""The speed experiment: what it reports, and how it watches processes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from experiments.speed import between, report, watch
from experiments.speed.overhead import ENGINES, PLANS, overhead
from experiments.speed.run import FLOWER_CLIENTS, Bench
from experiments.speed.whole import Trainer
from fedsplit.settings.flags import parse

EXPERIMENT = Path("experiments/speed")


def record(side: str, repeat: int, seconds: float, **more: object) -> dict:
    return {
        "model": "default",
        "dtype": "fp32",
        "side": side,
        "repeat": repeat,
        "tokens": 1000,
        "seconds": seconds,
        "cpu_seconds": 2 * seconds,
        "peak_memory": {"worker": 10**6 * (repeat + 1)},
        "others": 0.0,
        **more,
    }


def test_ratios_are_formed_within_a_repeat() -> None:
    records = [record("whole", 0, 1), record("pair", 0, 0.5), record("whole", 1, 4), record("pair", 1, 4)]
    assert report.ratios(records, "pair") == [2.0, 1.0]
    assert report._row(records, "pair") == [
        "pair",
        "1,125 (250 to 2,000)",
        "1.5 (1 to 2)",
        "",
        "4.5",
        "2",
        "process 2",
        "0%",
    ]


def test_the_report_replaces_what_is_between_its_marks(tmp_path: Path) -> None:
    shutil.copy(EXPERIMENT / "README.md", tmp_path)
    for text in ("the old table", "the new table"):
        report.write_between(tmp_path / "README.md", "result.json", text)
    written = (tmp_path / "README.md").read_text()
    assert "the old table" not in written and written.count("the new table\n\n<!-- end of result.json -->") == 1
    with pytest.raises(ValueError, match=r"no place for other\.json"):
        report.write_between(tmp_path / "README.md", "other.json", "")


def test_the_cpu_time_of_children_is_counted(tmp_path: Path) -> None:
    spin = "import time\nwhile time.process_time() < 1: pass"
    child = f"import subprocess, sys, time; subprocess.run([sys.executable, '-c', {spin!r}]); "
    log = f"open({str(tmp_path / 'log')!r}, 'w').write('{{\"event\": \"end\"}}\\n'); time.sleep(2)"
    watch_often = watch.LOOK_EVERY
    watch.LOOK_EVERY = 0.05
    try:
        events, tree = watch.follow([sys.executable, "-c", child + log], tmp_path / "log", {}, tmp_path / "output")
    finally:
        watch.LOOK_EVERY = watch_often
    assert [event["event"] for event in events] == ["end"]
    assert events[0]["cpu"] > 0.1 and len(tree.cpu) == 2 and tree.peak_memory["command"] > 10**6


def test_a_command_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="broken"):
        watch.follow([sys.executable, "-c", "raise SystemExit('broken')"], tmp_path / "log", {}, tmp_path / "output")


def test_every_side_trains_on_as_many_tokens() -> None:
    models = tomllib.loads((EXPERIMENT / "config.toml").read_text())["models"]
    for model in models.values():
        bench = Bench(model, "fp32", "sotu-gpt2", 0, Path())
        for clients in (1, 4, FLOWER_CLIENTS):
            config = parse(bench.flags(clients))
            assert config.train.steps * clients == model["steps"] and config.rounds >= 2


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_baseline_trains_adapters_in_float32(dtype: str) -> None:
    trainer = Trainer(parse(["--lora.dropout", "0", "--lr", "0.01"]), dtype)
    ids = torch.arange(64).reshape(2, 32)
    losses = [float(trainer.step(ids)) for _ in range(4)]
    assert losses[-1] < losses[0]
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    frozen = {p.dtype for p in trainer.model.parameters() if not p.requires_grad}
    assert {p.dtype for p in trained} == {torch.float32}
    assert frozen == {torch.float32 if dtype == "fp32" else torch.bfloat16}


def test_the_worker_waits_and_trains_on_until_it_is_told(tmp_path: Path) -> None:
    flags = ["--train.batch-size", "1", "--train.max-length", "8"]
    command = [sys.executable, "-m", "experiments.speed.whole", "--threads", "1", "--steps", "1", "--warmup", "1"]
    done = subprocess.run([*command, "--", *flags], input="go\n", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ready\n{") and '"tokens": 8' in done.stdout


def test_overhead_is_what_is_left_without_steps_and_sequences() -> None:
    """Training 1 + 0.2 a step, evaluation 0.5 + 0.1 a sequence, 0.3 between: 1.8 of 3 + 3.7 + 0.3 = 7."""
    records = [
        {"steps": s, "sequences": n, "train": 1 + 0.2 * s, "evaluate": 0.5 + 0.1 * n, "between": 0.3}
        for s, n in PLANS
        for _ in range(3)
    ]
    found = overhead(records)
    assert found == pytest.approx({"round": 7.0, "train": 1.0, "evaluate": 0.5, "between": 0.3, "share": 1.8 / 7.0})
    machine = {"versions": {}, "cpu": "x", "cores": 2, "memory": 2**30, "commit": "y", "date": "z"}
    both = [{**record, "engine": engine} for record in records for engine in ENGINES]
    text = report.overhead_text({"machine": machine, "records": both})
    assert "| not computation, in all | 1,800 | 25.7% | 1,800 | 25.7% |" in text


def test_what_lies_between_rounds_is_neither_training_nor_evaluation() -> None:
    events = [
        {"event": "evaluate", "round": 1, "elapsed": 10.0, "seconds": 1.0},
        {"event": "train", "round": 2, "elapsed": 14.0, "seconds": 3.0},
        {"event": "aggregate", "round": 2, "elapsed": 14.5, "seconds": 0.25},
        {"event": "evaluate", "round": 2, "elapsed": 16.0, "seconds": 2.0},
    ]
    assert between.between(events, rounds=2) == [1.0]
