"""Measures one sweep beside as many separate commands as the study has runs.

    python -m experiments.comparison.run

All sides play the runs of `study.toml` with the same settings, one side after the other: the sweep, then each run by a
command of its own, with the engine `local` and with the default engine, `ray`. Writes `seconds.json` and, from the last
sweep, `table.csv`, `comparison.md` and `comparison.json`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from experiments.speed.run import disturbed, machine

HERE = Path(__file__).parent


def command(*words: object) -> dict[str, Any]:
    """Runs a command, and returns its seconds and what share of the cores others took."""
    before = psutil.cpu_times()
    own = psutil.Process().cpu_times()
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "fedsplit", *map(str, words)], check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - started
    now = psutil.Process().cpu_times()
    cpu = now.children_user + now.children_system - own.children_user - own.children_system
    return {"seconds": seconds, "cpu_seconds": cpu, "others": disturbed(before, cpu, seconds)}


def digest(run: Path) -> str:
    """The digest of a run's adapter."""
    return hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def separately(sweep: Path, out: Path, engine: str) -> list[dict[str, Any]]:
    """Plays the runs of a finished sweep again, each by a command of its own, and compares the adapters."""
    records = []
    for run in sorted((sweep / "runs").iterdir()):
        alone = out / run.name
        record = command("simulate", "--config", run / "config.toml", "--engine", engine, "--out", alone)
        records.append({"run": run.name, "equal": digest(alone) == digest(run), **record})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--study", type=Path, default=HERE / "study.toml")
    parser.add_argument("--engines", nargs="*", default=["local", "ray"])
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    repeats: list[dict[str, Any]] = []
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as scratch:
            sweep = Path(scratch) / "sweep"
            record: dict[str, Any] = {"sweep": command("sweep", args.study, "--out", sweep)}
            for engine in args.engines:
                record[engine] = separately(sweep, Path(scratch) / engine, engine)
            repeats.append(record)
            for name in ("table.csv", "comparison.md", "comparison.json"):
                shutil.copyfile(sweep / name, args.out / name)
        text = json.dumps({"machine": machine(), "repeats": repeats}, indent=1) + "\n"
        (args.out / "seconds.json").write_text(text)
        print(f"sweep {repeats[-1]['sweep']['seconds']:.0f} s", flush=True)
        for engine in args.engines:
            alone = sum(each["seconds"] for each in repeats[-1][engine])
            print(f"separate commands, engine {engine}: {alone:.0f} s", flush=True)


if __name__ == "__main__":
    main()
