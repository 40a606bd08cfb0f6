"""What each of the trunk's schedules makes of the same tokens.

    python -m experiments.trunk.schedules

For every seed, every schedule in turn, by the command a user would type, with settings at their defaults.
Writes `schedules.json` after every run; `report.py` makes of it what is to be read.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from experiments.speed.run import disturbed, environment, machine, wait_for_quiet
from experiments.speed.watch import follow

HERE = Path(__file__).parent
SCHEDULES = {
    "shared": "",
    "shared, deterministic": "--deterministic",
    "batched": "--trunk.schedule batched",
    "accumulate, every 1": "--trunk.schedule accumulate --trunk.every 1",
    "accumulate, every 0": "--trunk.schedule accumulate --trunk.every 0",
    "copies": "--trunk.schedule copies",
    "frozen": "--trunk.schedule frozen",
    "forward-only": "--trunk.schedule forward-only",
}


def rounds_of(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every round what the report needs; of round 0, before training, only what was measured."""
    rounds: dict[int, dict[str, Any]] = {}
    for event in events:
        found = rounds.setdefault(event["round"], {"round": event["round"]})
        if event["event"] == "train":
            found |= {name: event[name] for name in ("tokens", "seconds", "loss", "trunk")}
        elif event["event"] == "evaluate":
            found |= {"held_out": event["loss"], "forgotten": event["forgotten"]}
    return [rounds[number] for number in sorted(rounds)]


def measure(flags: Sequence[str]) -> dict[str, Any]:
    """Runs the command once."""
    before, own, started = psutil.cpu_times(), time.process_time(), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        command = [sys.executable, "-m", "fedsplit.simulate", *flags, "--out", str(out)]
        events, tree = follow(command, out / "metrics.jsonl", environment(), Path(scratch) / "output")
        summary = json.loads((out / "summary.json").read_text())
    seconds = time.monotonic() - started
    cpu = sum(tree.cpu.values())
    ours = cpu + time.process_time() - own
    return {
        "rounds": rounds_of(events),
        "clients": summary["clients"],
        "trains": {part: count["trainable"] for part, count in summary["parameters"].items()},
        "cpu_seconds_of_command": cpu,
        "seconds_of_command": seconds,
        "peak_memory": tree.peak_memory,
        "others": disturbed(before, ours, seconds),
    }


def _line(record: dict[str, Any]) -> str:
    last, trained = record["rounds"][-1], record["rounds"][1:]
    speed = sum(r["tokens"] for r in trained) / sum(r["seconds"] for r in trained)
    return (
        f"{record['schedule']}, seed {record['seed']}: held-out loss {last['held_out']:.4f}, {speed:,.0f} tokens/s, "
        f"{sum(r['trunk'].get('steps', 0) for r in trained)} steps of the trunk; "
        f"{record['seconds_of_command']:.0f} s, others {record['others']:.0%}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "schedules.json")
    parser.add_argument("--rounds", type=int, default=5, help="at least 2")
    parser.add_argument("--seeds", type=lambda text: [int(n) for n in text.split(",")], default=[0, 1])
    parser.add_argument("--schedules", type=lambda text: text.split(";"), default=list(SCHEDULES), help="NAME;NAME;…")
    parser.add_argument("--extra", type=shlex.split, default=[], help="flags for all runs")
    parser.add_argument("--quiet", type=float, default=0.1, help="share of the cores that others may use; see --wait")
    parser.add_argument("--wait", type=float, default=60, help="seconds to wait at most before each, until it is quiet")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds: at least 2, since the first one is warm-up")
    records: list[dict[str, Any]] = []
    result = {"machine": machine(), "rounds": args.rounds, "extra": args.extra, "records": records}
    failures = 0
    for seed in args.seeds:
        for schedule in args.schedules:
            wait_for_quiet(args.quiet, args.wait)
            flags = ["--seed", str(seed), "--rounds", str(args.rounds), *shlex.split(SCHEDULES[schedule]), *args.extra]
            try:
                record = {"schedule": schedule, "seed": seed, **measure(flags)}
            except RuntimeError as error:
                failures += 1
                print(f"{schedule}, seed {seed}, failed: {error}", file=sys.stderr, flush=True)
                continue
            records.append(record)
            print(_line(record), flush=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
