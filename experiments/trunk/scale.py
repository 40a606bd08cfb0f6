"""What a round takes, and what each process holds, against the number of virtual clients.

    python -m experiments.trunk.scale

By the command a user would type, with few and small steps a client. The first round is warm-up.
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
FLAGS = shlex.split(
    "--train.steps 2 --train.batch-size 2 --train.max-length 64 --eval.samples 2 --eval.after 0 --partition iid"
)


def spans(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every round's training and evaluation: seconds, and CPU seconds of all processes since the one before.

    What aggregation takes is with the evaluation that follows it.
    """
    found, before = [], 0.0
    for event in events:
        if event["event"] not in ("train", "evaluate"):
            continue
        measured = {name: event[name] for name in ("event", "round", "tokens", "seconds")}
        if event["event"] == "train":
            measured["trunk_resident"] = event["trunk"]["resident_memory"]
        found.append({**measured, "cpu_seconds": event["cpu"] - before})
        before = event["cpu"]
    return found


def measure(clients: int, rounds: int, extra: Sequence[str]) -> dict[str, Any]:
    """Runs the command once."""
    before, own, started = psutil.cpu_times(), time.process_time(), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        flags = ["--clients", str(clients), "--rounds", str(rounds), *FLAGS, *extra, "--out", str(out)]
        command = [sys.executable, "-m", "fedsplit.simulate", *flags]
        events, tree = follow(command, out / "metrics.jsonl", environment(), Path(scratch) / "output")
    seconds = time.monotonic() - started
    cpu = sum(tree.cpu.values())
    return {
        "clients": clients,
        "spans": spans(events),
        "cpu_seconds_of_command": cpu,
        "seconds_of_command": seconds,
        "peak_memory": tree.peak_memory,
        "others": disturbed(before, cpu + time.process_time() - own, seconds),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "scale.json")
    parser.add_argument("--clients", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 64, 512])
    parser.add_argument("--rounds", type=int, default=2, help="at least 2")
    parser.add_argument("--extra", type=shlex.split, default=[], help="flags for all runs")
    parser.add_argument("--quiet", type=float, default=0.1, help="share of the cores that others may use; see --wait")
    parser.add_argument("--wait", type=float, default=60, help="seconds to wait at most before each, until it is quiet")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds: at least 2, since the first one is warm-up")
    records: list[dict[str, Any]] = []
    result = {"machine": machine(), "flags": [*FLAGS, *args.extra], "rounds": args.rounds, "records": records}
    failures = 0
    for clients in args.clients:
        wait_for_quiet(args.quiet, args.wait)
        try:
            record = measure(clients, args.rounds, args.extra)
        except RuntimeError as error:
            failures += 1
            print(f"{clients} clients failed: {error}", file=sys.stderr, flush=True)
            continue
        records.append(record)
        last = record["spans"][-2]
        memory = ", ".join(f"{role} {peak / 1e6:.0f} MB" for role, peak in record["peak_memory"].items())
        print(
            f"{clients} clients: last round's training {last['seconds']:.2f} s, {last['cpu_seconds']:.2f} CPU s; "
            f"{memory}; {record['seconds_of_command']:.0f} s, others {record['others']:.0%}",
            flush=True,
        )
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
