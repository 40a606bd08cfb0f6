"""Does a long run grow? Plays 300 rounds in which clients abandon one forward in twenty, and fits a line.

$ python -m experiments.reliability.soak --rounds 300        # writes soak.json beside this file

All parties are in this process, so that its memory is that of the trunk, the clients and the server together.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from fedsplit.engines import in_process
from fedsplit.events import Event, Sink
from fedsplit.events.event_types import RoundEnded
from fedsplit.federation.aggregation import strategy_defaults
from fedsplit.federation.strategy import load_strategy
from fedsplit.settings.config import Config
from fedsplit.settings.documents import build
from fedsplit.wire.packets import Packet
from fedsplit.wire.transport import PendingAnswer

RESULT = Path(__file__).with_suffix(".json")

ABANDONED = 0.05
"""Share of the training forwards after which a client goes away."""

SETTINGS: dict[str, Any] = {
    "clients": 4,
    "model": "sotu-gpt2",
    "engine": "local",
    "lora.rank": 2,
    "train.steps": 2,
    "train.batch_size": 2,
    "train.max_length": 32,
    "eval.samples": 2,
    "eval.after": 0,
    "train.optimizer_state": "keep",
    "quorum": 0.0,
}


class Gone(Exception):
    """A client goes away in the middle of a step."""


class AbandoningWay(in_process.Heard):
    """A client's way to the trunk, on which the client sometimes goes away after a forward."""

    draw = random.Random(0)
    abandoned = 0
    forwards = 0

    def send(self, packet: Packet) -> PendingAnswer:
        """Sends a packet; sometimes the answer is never waited for."""
        answer = super().send(packet)
        if not packet.training or "hidden" not in packet.tensors:
            return answer
        AbandoningWay.forwards += 1
        if self.draw.random() >= ABANDONED:
            return answer
        AbandoningWay.abandoned += 1

        def wait() -> Packet:
            answer()  # the trunk computes the forward, and keeps its graph for a gradient that never comes
            raise Gone

        return wait


class Gauge(Sink):
    """Measures the process and its folder after each round."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process = psutil.Process()
        self.rows: list[dict[str, int]] = []

    def handle(self, event: Event) -> None:
        """Takes a measurement where a round has ended."""
        if not isinstance(event, RoundEnded):
            return
        files = [path for path in self._folder.rglob("*") if path.is_file()]
        log = self._folder / "metrics.jsonl"
        self.rows.append(
            {
                "round": event.round,
                "memory": self._process.memory_info().rss,
                "descriptors": self._process.num_fds(),
                "threads": threading.active_count(),
                "files": len(files),
                "disk": sum(path.stat().st_size for path in files if path != log),
                "log": log.stat().st_size if log.exists() else 0,
            }
        )


@contextmanager
def abandoning() -> Iterator[None]:
    """Puts clients that abandon steps in place of others."""
    before = in_process.Heard
    in_process.Heard = AbandoningWay  # type: ignore[misc]
    try:
        yield
    finally:
        in_process.Heard = before  # type: ignore[misc]


def slope(rows: list[dict[str, int]], name: str) -> float:
    """Returns the slope of a quantity over the rounds, by least squares."""
    count = len(rows)
    mean_round = sum(row["round"] for row in rows) / count
    mean_value = sum(row[name] for row in rows) / count
    covariance = sum((row["round"] - mean_round) * (row[name] - mean_value) for row in rows)
    return covariance / sum((row["round"] - mean_round) ** 2 for row in rows)


def play(config: Config) -> dict[str, Any]:
    """Plays a run, and returns what the second half of its rounds shows."""
    with tempfile.TemporaryDirectory() as folder, abandoning():
        gauge = Gauge(Path(folder, "run"))
        strategy = load_strategy(config.strategy, {}, strategy_defaults(config))
        federation = in_process.federate(config, Path(folder, "run"), strategy, gauge)
    assert federation.summary is not None
    second_half = gauge.rows[len(gauge.rows) // 2 :]
    names = ("memory", "descriptors", "threads", "files", "disk", "log")
    return {
        "schedule": config.trunk.schedule,
        "strategy": config.strategy,
        "rounds": config.rounds,
        "forwards": AbandoningWay.forwards,
        "abandoned": AbandoningWay.abandoned,
        "client_rounds": federation.summary["client_rounds"],
        "first": gauge.rows[1],
        "middle": second_half[0],
        "last": gauge.rows[-1],
        "slope_in_second_half": {name: slope(second_half, name) for name in names},
    }


def main(argv: list[str] | None = None) -> int:
    """Plays the runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--out", type=Path, default=RESULT)
    rounds = parser.parse_args(argv)
    results = []
    for schedule, strategy in (("shared", "fedadam"), ("copies", "scaffold")):
        AbandoningWay.draw = random.Random(0)
        AbandoningWay.abandoned = AbandoningWay.forwards = 0
        config = build({**SETTINGS, "rounds": rounds.rounds, "trunk.schedule": schedule, "strategy": strategy})
        results.append(play(config))
        print(json.dumps(results[-1]), flush=True)
    rounds.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
