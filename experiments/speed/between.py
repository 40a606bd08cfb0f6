"""Seconds between a round's evaluation and the next round's training, of two checkouts in turns.

    python -m experiments.speed.between /path/to/old /path/to/new      # writes between.json beside this file

The default run with one step a round and four held-out sequences: what lies between both does not depend on them.
Other processes of the machine count, as they do for a user; the load is written down.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.speed.run import environment, machine

HERE = Path(__file__).parent
ROUNDS = 7


def between(events: Sequence[Mapping[str, Any]], rounds: int) -> list[float]:
    """Returns the seconds of all rounds but the first that are neither training nor evaluation."""
    ends = {event["round"]: event["elapsed"] for event in events if event["event"] == "evaluate"}
    found = []
    for round in range(2, rounds + 1):
        busy = [
            event["seconds"] for event in events if event["round"] == round and event["event"] in ("train", "evaluate")
        ]
        found.append(ends[round] - ends[round - 1] - sum(busy))
    return found


def measure(checkout: Path) -> list[float]:
    """Runs once by the code of a checkout."""
    with tempfile.TemporaryDirectory() as scratch:
        call = [sys.executable, "-m", "fedsplit.simulate", "--out", f"{scratch}/run", "--rounds", str(ROUNDS)]
        call += ["--train.steps", "1", "--eval.samples", "4", "--eval.after", "0"]
        settings = {**environment(), "PYTHONPATH": str(checkout)}
        subprocess.run(call, check=True, stdout=subprocess.DEVNULL, env=settings, cwd=scratch)
        events = [json.loads(line) for line in Path(f"{scratch}/run/metrics.jsonl").read_text().splitlines()]
    return between(events, ROUNDS)


def main() -> None:
    """Measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--out", type=Path, default=HERE / "between.json")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    records: list[dict[str, Any]] = []
    for repeat in range(args.repeats):
        for name, checkout in (("old", args.old), ("new", args.new)):
            commit = subprocess.run(
                ["git", "rev-parse", "--short", "HEAD"], cwd=checkout, capture_output=True, text=True
            )
            facts = {"repeat": repeat, "checkout": name, "commit": commit.stdout.strip(), "load": os.getloadavg()[0]}
            records.append({**facts, "seconds": measure(checkout)})
        args.out.write_text(json.dumps({"machine": machine(), "records": records}, indent=1) + "\n")
    for name in ("old", "new"):
        seconds = [value for record in records if record["checkout"] == name for value in record["seconds"]]
        print(f"{name}: median {statistics.median(seconds) * 1e3:.0f} ms, least {min(seconds) * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
