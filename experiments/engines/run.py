"""Measures the engines side by side: time until round 0 is reported, tokens a second, CPU time.

    python -m experiments.engines.run

A repeat runs every side once, one after the other, as whole commands. What other programs take of the cores is noted,
and a side that was disturbed is run again. Writes `result.json` after every run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from experiments.speed.run import disturbed, environment, machine, wait_for_quiet
from experiments.speed.watch import follow

HERE = Path(__file__).parent

SIDES = {
    "ray": ["--engine", "ray"],
    "local": ["--engine", "local", "--workers", "2"],
    "local --workers 1": ["--engine", "local", "--workers", "1"],
}
"""Flags of each side, by its name."""


def measure(flags: Sequence[str]) -> dict[str, Any]:
    """Runs a federation once; the first round, in which much is done for the first time, does not count."""
    before = psutil.cpu_times()
    own = time.process_time()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        command = [sys.executable, "-m", "fedsplit.simulate", *flags, "--out", str(out)]
        events, tree = follow(command, out / "metrics.jsonl", environment(), Path(scratch) / "output")
    seconds = time.monotonic() - started
    cpu = sum(tree.cpu.values())
    first = next(event for event in events if event["event"] == "evaluate")
    rounds = []
    for earlier, event in itertools.pairwise(events):
        if event["event"] == "train" and event["round"] > 1:
            rounds.append((event["tokens"], event["seconds"], event["cpu"] - earlier["cpu"]))
    tokens = sum(round[0] for round in rounds)
    return {
        "start_seconds": first["elapsed"],
        "start_cpu_seconds": first["cpu"],
        "tokens_per_second": tokens / sum(round[1] for round in rounds),
        "cpu_seconds_per_1000_tokens": 1000 * sum(round[2] for round in rounds) / tokens,
        "others": disturbed(before, cpu + time.process_time() - own, seconds),
    }


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Returns the medians of each side, as lines of a table."""
    lines = ["| side | runs | s to round 0 | CPU s to round 0 | tokens/s | CPU s / 1,000 tokens | others |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for side in dict.fromkeys(record["side"] for record in records):
        runs = [record for record in records if record["side"] == side]
        names = ("start_seconds", "start_cpu_seconds", "tokens_per_second", "cpu_seconds_per_1000_tokens", "others")
        start, start_cpu, speed, cpu, others = (statistics.median(run[name] for run in runs) for name in names)
        lines.append(
            f"| {side} | {len(runs)} | {start:.1f} | {start_cpu:.1f} | {speed:,.0f} | {cpu:.3f} | {others:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs all sides in turn, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "result.json")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="at least 2")
    parser.add_argument("--steps", type=int, default=20, help="local steps a round")
    parser.add_argument("--quiet", type=float, default=0.1, help="share of the cores that others may have")
    parser.add_argument("--wait", type=float, default=60, help="seconds to wait at most until it is quiet")
    parser.add_argument("--redo", type=int, default=0, help="times to run again what others disturbed")
    args = parser.parse_args()
    flags = ["--clients", args.clients, "--rounds", args.rounds, "--train.steps", args.steps]
    records: list[dict[str, Any]] = []
    result = {"machine": machine(), "flags": list(map(str, flags)), "records": records}
    for repeat in range(args.repeats):
        for side, own in SIDES.items():
            for _ in range(args.redo + 1):
                wait_for_quiet(args.quiet, args.wait)
                record = {"side": side, "repeat": repeat, **measure([*map(str, flags), *own])}
                print(json.dumps(record), flush=True)
                if record["others"] <= args.quiet:
                    break
            records.append(record)
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(records))


if __name__ == "__main__":
    main()
