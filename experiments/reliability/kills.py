"""Do deaths at random change the result? Kills trunks and client processes in the middle of runs.

$ python -m experiments.reliability.kills --seeds 12            # writes kills.json beside this file

All parties are in one process: a trunk that dies is gone with all it knew, and a client process that dies loses its
answer after its work, or before. `tests/engines/test_ray_engine.py` kills real processes of the engine `ray`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments.reliability.mortal import MortalTrunk
from fedsplit.engines import in_process
from fedsplit.events import Event, Sink
from fedsplit.events.event_types import ClientFailed, ClientLost, RoundDiscarded
from fedsplit.federation.aggregation import strategy_defaults
from fedsplit.federation.messages import CLIENT_LOST, Answer, Failure, Introduce, Request
from fedsplit.federation.strategy import load_strategy
from fedsplit.settings.documents import build
from fedsplit.trunk import local

RESULT = Path(__file__).with_suffix(".json")

STRATEGIES = ("fedavg", "scaffold", "fedex", "fedadam", "fedsa")

SCHEDULES = ("copies", "shared")

SETTINGS: dict[str, Any] = {
    "clients": 3,
    "rounds": 3,
    "engine": "local",
    "lora.rank": 2,
    "train.steps": 2,
    "train.batch_size": 2,
    "train.max_length": 32,
    "train.optimizer_state": "keep",
    "eval.samples": 2,
    "eval.after": 1,
    "deterministic": True,
    "max_failures": 30,
}

TRUNK_DEATHS, CLIENT_DEATHS = 3, 3
"""Deaths in a run."""


class MortalClients(in_process.LocalClients):
    """Clients whose process dies at some requests, before or after the work."""

    deaths: set[int] = set()  # noqa: RUF012  # numbers of requests, of all of a run
    requests = 0

    def answer(self, request: Request) -> Answer:
        """Answers one request, unless the client's process dies."""
        if isinstance(request, Introduce):
            return super().answer(request)
        number = MortalClients.requests
        MortalClients.requests += 1
        dies = number in MortalClients.deaths
        if dies and number % 2:
            return Failure(request.client, CLIENT_LOST, "killed before its work")
        answer = super().answer(request)
        return Failure(request.client, CLIENT_LOST, "killed after its work") if dies else answer


class Losses(Sink):
    """Counts what was lost."""

    def __init__(self) -> None:
        self.rounds = self.clients = self.failed = 0

    def handle(self, event: Event) -> None:
        """Counts an event."""
        self.rounds += isinstance(event, RoundDiscarded)
        self.clients += isinstance(event, ClientLost)
        self.failed += isinstance(event, ClientFailed)


def digest(run: Path) -> str:
    """Returns the sha256 over the adapter and all tensors of the newest checkpoints."""
    total = hashlib.sha256()
    for path in sorted(run.rglob("*.safetensors")):
        total.update(str(path.relative_to(run)).encode())
        total.update(path.read_bytes())
    return total.hexdigest()


def play(schedule: str, strategy: str, trunk_deaths: set[float], client_deaths: set[int]) -> tuple[str, Losses]:
    """Plays a run with deaths; returns the digest of its adapters, and what was lost."""
    config = build({**SETTINGS, "trunk.schedule": schedule, "strategy": strategy})
    MortalTrunk.reset(set(trunk_deaths))
    MortalClients.deaths = set(client_deaths)
    MortalClients.requests = 0
    losses = Losses()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        in_process.federate(config, out, load_strategy(strategy, {}, strategy_defaults(config)), losses)
        return digest(out), losses


def main(argv: list[str] | None = None) -> int:
    """Plays all runs; the exit code is 1 where an adapter differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args(argv)
    local.LocalTrunk = MortalTrunk  # type: ignore[misc]
    in_process.LocalClients = MortalClients  # type: ignore[misc]
    rows = []
    for schedule in SCHEDULES:
        for strategy in STRATEGIES:
            expected, _ = play(schedule, strategy, set(), set())
            calls, requests = len(MortalTrunk.handled), MortalClients.requests
            row: dict[str, Any] = {"schedule": schedule, "strategy": strategy, "runs": 0, "equal": 0}
            row |= {"rounds_lost": 0, "clients_lost": 0, "clients_failed": 0}
            for seed in range(arguments.seeds):
                draw = random.Random(seed)
                trunks = {draw.randrange(2 * calls) / 2 for _ in range(TRUNK_DEATHS)}
                clients = {draw.randrange(requests) for _ in range(CLIENT_DEATHS)}
                found, losses = play(schedule, strategy, trunks, clients)
                row["runs"] += 1
                row["equal"] += found == expected
                row["rounds_lost"] += losses.rounds
                row["clients_lost"] += losses.clients
                row["clients_failed"] += losses.failed
            rows.append(row)
            print(json.dumps(row), flush=True)
    arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if all(row["equal"] == row["runs"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
