"""What pipelining, local steps, schedules, codecs and cuts buy on each named network, in virtual seconds.

    python -m experiments.network.buys             # buys.json beside this file
    python -m experiments.network.report           # the tables of README.md, and the picture

Every setting trains once, by the engine `local`: the same number of steps for each client, on the same text. The trace
of each round is then replayed on every named network, so that a row needs one run. Virtual seconds are those of
training, from the server's first message of a round to the last update; evaluation is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from experiments.speed.run import machine
from fedsplit.engines.in_process import federate
from fedsplit.federation.aggregation import strategy_defaults
from fedsplit.federation.strategy import load_strategy
from fedsplit.federation.virtual_time import VirtualTime
from fedsplit.network.profiles import PROFILES
from fedsplit.network.replay import ClientPhase
from fedsplit.network.times import PLACES
from fedsplit.settings.config import Config
from fedsplit.settings.documents import build

HERE = Path(__file__).parent
CLIENTS = 8
STEPS = 8

BASE: dict[str, Any] = {
    "clients": CLIENTS,
    "rounds": 2,
    "train.steps": STEPS // 2,
    "train.micro_batches": 1,
    "eval.after": 0,
    "eval.samples": 4,
    "eval.every": STEPS,  # the last round is measured in any case
    "engine": "local",
    "threads": 1,
    "report": False,
    # The bundled model computes a tenth of GPT-2 small's operations for a byte on the wire: at a tenth of the default
    # speeds, both have the same ratio of computing to sending.
    "network.profile": "lan",
    "network.client_tflops": 0.1,
    "network.trunk_tflops": 2.0,
}

ROWS: dict[str, dict[str, dict[str, Any]]] = {
    "micro-batches": {str(count): {"train.micro_batches": count} for count in (1, 2, 4)},
    "local steps a round": {str(steps): {"train.steps": steps, "rounds": STEPS // steps} for steps in (1, 2, 4, 8)},
    "schedule": {
        "shared": {},
        "batched": {"trunk.schedule": "batched"},
        "accumulate, every 1": {"trunk.schedule": "accumulate", "trunk.every": 1},
        "accumulate, every 0": {"trunk.schedule": "accumulate"},
        "copies": {"trunk.schedule": "copies"},
        "frozen": {"trunk.schedule": "frozen"},
        "forward-only": {"trunk.schedule": "forward-only"},
    },
    "codec": {codec: {"wire.codec": codec} for codec in ("raw", "bf16", "int8", "int4", "topk:0.1,int8")},
    "cut": {cut: {"cut": cut} for cut in ("1:5", "1:3", "2:4", "3:5", "2:5")},
}


@contextlib.contextmanager
def trainings() -> Iterator[list[tuple[int, Mapping[int, ClientPhase], VirtualTime]]]:
    """Collects the trainings that are replayed inside the context: round, work of the clients, and clock."""
    seen: list[tuple[int, Mapping[int, ClientPhase], VirtualTime]] = []
    method = VirtualTime.replay

    def spy(self: VirtualTime, phases: Mapping[int, ClientPhase], round: int, phase: str) -> Any:
        if phase == "training":
            seen.append((round, phases, self))
        return method(self, phases, round, phase)

    VirtualTime.replay = spy  # type: ignore[method-assign]  # for the time of the context
    try:
        yield seen
    finally:
        VirtualTime.replay = method  # type: ignore[method-assign]


def run(config: Config, out: Path) -> dict[str, Any]:
    """Trains once, and replays the training on every named network."""
    with trainings() as seen:
        federate(config, out, load_strategy(config.strategy, {}, strategy_defaults(config)))
    networks: dict[str, Any] = {}
    for name, profile in PROFILES.items():
        seconds = 0.0
        places = dict.fromkeys(PLACES, 0.0)
        for number, phases, clock in seen:
            place = replace(clock.field, profiles=[profile] * config.clients)
            clock.field = place
            found = clock.replay(phases, number, "training")
            seconds += found.end
            for client, spent in found.spent.items():
                for where, own in spent.seconds.items():
                    places[where] += own / config.clients
                places["others"] += (found.end - found.arrivals[client]) / config.clients
        networks[name] = {"seconds": seconds, "places": places}
    summary = json.loads((out / "summary.json").read_text())
    return {"networks": networks, "held_out": summary["eval_loss"]["after"], "bytes": summary["bytes"]}


def main() -> None:
    """Plays all rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "buys.json")
    parser.add_argument("--steps", type=int, default=None, help="local steps of every row, for a trial")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), help="groups of rows")
    args = parser.parse_args()
    torch.set_num_threads(1)
    records: list[dict[str, Any]] = []
    done: dict[str, dict[str, Any]] = {}
    for group in args.rows:
        for name, settings in ROWS[group].items():
            values = {**BASE, **settings} | ({} if args.steps is None else {"train.steps": args.steps, "rounds": 1})
            key = json.dumps(values, sort_keys=True)
            if key not in done:  # the baseline is a row of every group
                with tempfile.TemporaryDirectory() as scratch:
                    done[key] = run(build(values), Path(scratch) / "run")
            records.append({"group": group, "row": name, "settings": settings, **done[key]})
            times = {network: round(found["seconds"], 3) for network, found in done[key]["networks"].items()}
            print(f"{group} {name}: {times}", flush=True)
            result = {"machine": machine(), "base": BASE, "steps": STEPS, "records": records}
            args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
