"""Collects the rounds of the study of the trunk's schedules.

    fedsplit sweep experiments/trunk/schedules.toml
    python -m experiments.trunk.schedules

Reads the study from `runs/schedules`, and writes schedules.json, of which `report.py` makes tables and a picture: the
study's comparison.json, with the rounds of all runs from their metrics under `records`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
STUDY = Path("runs/schedules")


def rounds_of(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of every round what the report needs; of round 0, before training, only what was measured."""
    rounds: dict[int, dict[str, Any]] = {}
    for event in events:
        found = rounds.setdefault(event["round"], {"round": event["round"]})
        if event["event"] == "train":
            found |= {name: event[name] for name in ("tokens", "seconds", "loss", "trunk")}
        elif event["event"] == "evaluate":
            found |= {"held_out": event["loss"], "forgotten": event["forgotten"]}
    return [rounds[number] for number in sorted(rounds)]


def record_of(run: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Of one run what the report needs.

    Args:
        run: The run's entry in comparison.json.
        folder: Folder of the run.
    """
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "schedule": run["label"],
        "seed": run["seed"],
        "rounds": rounds_of(events),
        "trains": {part: count["trainable"] for part, count in summary["parameters"].items()},
    }


def collected(study: Path) -> dict[str, Any]:
    """The comparison of a study, with the rounds of all runs.

    Args:
        study: Folder of a study that was played.
    """
    comparison = json.loads((study / "comparison.json").read_text())
    records = [record_of(run, study / "runs" / run["name"]) for run in comparison["runs"]]
    return {**comparison, "records": records}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=STUDY, help="folder of the study")
    parser.add_argument("--out", type=Path, default=HERE / "schedules.json")
    asked = parser.parse_args()
    asked.out.write_text(json.dumps(collected(asked.study), indent=1) + "\n")


if __name__ == "__main__":
    main()
