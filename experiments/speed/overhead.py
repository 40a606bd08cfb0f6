"""What a round takes beside its computation, in the default run.

    python -m experiments.speed.overhead

The default run is made with several numbers of local steps, and of held-out sequences, in turns. Straight lines
through the seconds of training by steps, and of evaluation by sequences, tell what either takes with none: messages,
adapters written and read, waiting for the last client. To that comes what lies between both: aggregation, the
checkpoint, events. The first round of a run, in which processes load model and data, is left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.speed.run import environment, machine

HERE = Path(__file__).parent
STEPS, SEQUENCES = 10, 32
"""Those of the default run."""

PLANS = [(STEPS, SEQUENCES), (1, SEQUENCES), (STEPS, SEQUENCES // 8)]
"""Steps a round and held-out sequences a client.

Fewer than the default run's, not more: noise is a share of the computation, so a line is told best near its beginning.
"""


ENGINES = ("ray", "flower")
"""Engines that are measured in turns."""


def measure(steps: int, sequences: int, rounds: int, extra: Sequence[str]) -> list[dict[str, float]]:
    """Seconds of training, of evaluation, and of all else, in every round but the first."""
    with tempfile.TemporaryDirectory() as scratch:
        call = [sys.executable, "-m", "fedsplit.simulate", "--out", f"{scratch}/run", "--rounds", str(rounds)]
        call += ["--train.steps", str(steps), "--eval.samples", str(sequences), "--eval.after", "0", *extra]
        subprocess.run(call, check=True, stdout=subprocess.DEVNULL, env=environment())
        events = [json.loads(line) for line in Path(f"{scratch}/run/metrics.jsonl").read_text().splitlines()]
    found = []
    ends = {event["round"]: event["elapsed"] for event in events if event["event"] == "evaluate"}
    for round in range(2, rounds + 1):
        timed = [event for event in events if event["round"] == round and "seconds" in event]
        seconds = {event["event"]: event["seconds"] for event in timed}
        whole = ends[round] - ends[round - 1]
        between = whole - seconds["train"] - seconds["evaluate"]
        found.append({"train": seconds["train"], "evaluate": seconds["evaluate"], "between": between})
    return found


def overhead(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds that a round of the default run takes, and of these those that are not computation.

    Args:
        records: Of `PLANS`, each with "steps", "sequences" and the seconds of one round.
    """

    def middle(what: str, steps: int, sequences: int) -> float:
        own = [r[what] for r in records if (r["steps"], r["sequences"]) == (steps, sequences)]
        return statistics.median(own)

    (steps, sequences), (fewer_steps, _), (_, fewer_sequences) = PLANS
    train, evaluate = middle("train", steps, sequences), middle("evaluate", steps, sequences)
    a_step = (train - middle("train", fewer_steps, sequences)) / (steps - fewer_steps)
    a_sequence = (evaluate - middle("evaluate", steps, fewer_sequences)) / (sequences - fewer_sequences)
    between = middle("between", steps, sequences)
    fixed = {"train": train - a_step * steps, "evaluate": evaluate - a_sequence * sequences, "between": between}
    whole = train + evaluate + between
    return {"round": whole, **fixed, "share": sum(fixed.values()) / whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "overhead.json")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    args, extra = parser.parse_known_args()
    records = []
    for repeat in range(args.repeats):
        for (steps, sequences), engine in itertools.product(PLANS, ENGINES):
            for found in measure(steps, sequences, args.rounds, ["--engine", engine, *extra]):
                facts = {"repeat": repeat, "engine": engine, "steps": steps, "sequences": sequences}
                records.append({**facts, **found})
            result = {"machine": machine(), "extra": extra, "records": records}
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    for engine in ENGINES:
        print(engine, json.dumps(overhead([record for record in records if record["engine"] == engine]), indent=1))


if __name__ == "__main__":
    main()
