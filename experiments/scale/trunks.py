"""What a round takes with one trunk, with a trunk in two stages, and with two replicas, on the cores of one machine.

    python -m experiments.scale.trunks                       # writes trunks.json beside this file

By the command a user would type, interleaved and several times. The first round of each run is warm-up. On two cores no
arrangement can be much faster than one trunk: the table shows what the messages between trunks cost.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments.speed.run import environment, machine

HERE = Path(__file__).parent

FLAGS = shlex.split("--clients 4 --rounds 4 --train.steps 10 --eval.samples 4 --eval.after 0")

CASES = {
    "one trunk": "--trunk.schedule copies",
    "2 stages": "--trunk.schedule copies --trunk.stages 1:3:5",
    "2 replicas": "--trunk.schedule copies --trunk.replicas 2",
    "one trunk, batched": "--trunk.schedule batched",
    "2 replicas, batched, averaged": "--trunk.schedule batched --trunk.replicas 2",
    "2 replicas, batched, as one": "--trunk.schedule batched --trunk.replicas 2 --trunk.sync step",
}
"""Flags by case. Under `copies` all arrangements must give the same adapter."""


def measure(case: str, scratch: Path) -> dict[str, Any]:
    """Runs the command once.

    Returns:
        Tokens a second of training by round but the first, bytes of peak memory of all trunks, bytes between stages,
        and the sha256 of the adapter.
    """
    out = scratch / "run"
    command = [sys.executable, "-m", "fedsplit.simulate", *FLAGS, *shlex.split(CASES[case]), "--out", str(out)]
    subprocess.run(command, env=environment(), check=True, stdout=subprocess.DEVNULL)
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rounds = [event for event in events if event["event"] == "train"][1:]
    summary = json.loads((out / "summary.json").read_text())
    adapter = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    return {
        "case": case,
        "speed": [event["tokens"] / event["seconds"] for event in rounds],
        "memory": summary["peak_memory"]["trunk"],
        "between_stages": sum(summary["bytes"].get(f"between_stages_{way}", 0) for way in ("up", "down")),
        "adapter": hashlib.sha256(adapter).hexdigest(),
    }


def rows(records: list[dict[str, Any]]) -> list[str]:
    """Returns the rows of the table in the README: speeds against the first case of the same schedule."""
    lines = []
    adapters = {record["adapter"] for record in records if record["case"] == "one trunk"}
    for case, flags in CASES.items():
        of_case = [record for record in records if record["case"] == case]
        if not of_case:
            continue
        base = "one trunk, batched" if "batched" in flags else "one trunk"
        pairs = zip(of_case, [record for record in records if record["case"] == base], strict=True)
        ratios = [statistics.median(one["speed"]) / statistics.median(other["speed"]) for one, other in pairs]
        memory = max(record["memory"] for record in of_case) / 1e6
        between = of_case[0]["between_stages"] / 1e6
        same = {record["adapter"] for record in of_case} == adapters if "copies" in flags else None
        word = "" if same is None else ("equal to the bit" if same else "DIFFERENT")
        lines.append(f"| {case} | {statistics.median(ratios):.2f} | {memory:,.0f} | {between:.1f} | {word} |")
    return lines


def main() -> None:
    """Measures, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "trunks.json")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    records = []
    for _ in range(args.repeats):
        for case in CASES:
            with tempfile.TemporaryDirectory() as scratch:
                records.append(measure(case, Path(scratch)))
        result = {"machine": machine(), "flags": FLAGS, "cases": CASES, "records": records}
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(rows(records)))


if __name__ == "__main__":
    main()
