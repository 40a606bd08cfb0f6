"""What a round takes, in time and memory, against the number of registered clients: always 100 of them train.

    python -m experiments.scale.clients                      # writes clients.json beside this file

By the command a user would type, with few and small steps a client, and a small data set of every client. Twenty
clients measure. The first round is warm-up.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments.speed.run import environment, machine
from experiments.speed.watch import follow

HERE = Path(__file__).parent

TRAINING, MEASURING = 100, 20
"""Clients that train in a round, and clients that measure."""

FLAGS = shlex.split(
    "--partition natural --train.steps 2 --train.batch-size 2 --train.max-length 32 --eval.samples 2 --eval.after 0 "
    "--trunk.schedule copies"
)


def write_data(path: Path, clients: int) -> None:
    """Writes two texts of each client."""
    with open(path, "w") as file:
        for client in range(clients):
            for number in range(2):
                text = f"My fellow citizens, this is speech {number} of speaker {client}. " * 6
                file.write(json.dumps({"text": text, "owner": f"speaker {client}"}) + "\n")


def measure(clients: int, rounds: int, scratch: Path) -> dict[str, Any]:
    """Runs the command once.

    Returns:
        Seconds until the first round; by round but the first, seconds of training, of evaluation and in all; bytes of
        resident memory by role at the end of the last round.
    """
    data, out = scratch / "data.jsonl", scratch / "run"
    write_data(data, clients)
    shares = ["--fraction", str(TRAINING / clients), "--eval.fraction", str(MEASURING / clients)]
    flags = ["--clients", str(clients), "--rounds", str(rounds), "--dataset", str(data), *shares, *FLAGS]
    command = [sys.executable, "-m", "fedsplit.simulate", *flags, "--out", str(out)]
    events, tree = follow(command, out / "metrics.jsonl", environment(), scratch / "output")
    ends = {event["round"]: event["elapsed"] for event in events if event["event"] == "evaluate"}
    seconds = {(event["event"], event["round"]): event["seconds"] for event in events}
    counted = range(2, rounds + 1)
    return {
        "clients": clients,
        "before": ends[0],
        "train": [seconds["train", round] for round in counted],
        "evaluate": [seconds["evaluate", round] for round in counted],
        "round": [ends[round] - ends[round - 1] for round in counted],
        "memory": events[-1]["memory"],
        "peak_memory": tree.peak_memory,
    }


def row(record: dict[str, Any]) -> str:
    """Returns a row of the table in the README."""
    middle = {name: statistics.median(record[name]) for name in ("train", "evaluate", "round")}
    memory = [f"{record['memory'].get(role, 0) / 1e6:,.0f}" for role in ("command", "client", "trunk")]
    times = [f"{seconds:.2f}" for seconds in middle.values()]
    cells = [f"{record['clients']:,}", *times, *memory, f"{record['before']:.0f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measures, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "clients.json")
    parser.add_argument("--clients", type=lambda text: [int(n) for n in text.split(",")], default=[100, 1000, 10000])
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    records = []
    for clients in args.clients:
        with tempfile.TemporaryDirectory() as scratch:
            records.append(measure(clients, args.rounds, Path(scratch)))
        print(row(records[-1]), flush=True)
        result = {"machine": machine(), "flags": FLAGS, "rounds": args.rounds, "records": records}
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
