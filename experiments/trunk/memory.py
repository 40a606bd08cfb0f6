"""Resident memory of the trunk's process, against the number of clients that ask it at the same time.

    python -m experiments.trunk.memory --cache runs/speed-cache

Every case has an actor of its own, started as by the command. Kinds of cases:

    crowd   all clients send a forward, and nobody a gradient before all have an answer; some steps
    budget  the same with `--trunk.memory`; who is told to wait asks again, once those that were served have sent
            their gradients
    copies  the schedule of that name; one client after the other makes one step, and nothing is pending
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from experiments.speed.models import folder_of
from experiments.speed.run import machine
from experiments.speed.watch import Tree
from fedsplit.engines.planning import plan
from fedsplit.environment import prepare
from fedsplit.settings.sections import TrunkSettings

HERE = Path(__file__).parent
MODELS = HERE.parent / "speed" / "config.toml"
KINDS = ("crowd", "budget", "copies")
SAFE = 8
"""So many clients fit without a look at what fewer took."""

VAIN = 3
"""Waves in a row of which nobody is served, at least, before the rest are given up."""

BUDGETS = {"default": "700MB", "gpt2-64": "2GB"}


class Crowd:
    """Clients without a model, who send hidden states of the right shape.

    Attributes:
        trunk: The handle of the actor that they ask.
    """

    def __init__(self, trunk: Any, run: str, shape: Sequence[int], patience: float, asks: bool) -> None:
        """Begins the round.

        Args:
            trunk: The handle of the actor.
            run: Its name.
            shape: Of hidden states, (B, T, D).
            asks: Whether the trunk has a budget, so that clients ask before they send.
            patience: Seconds without anybody served after which the rest are given up; `VAIN` waves at least.
        """
        import torch

        from fedsplit.wire.casting import EXACT

        self.trunk, self._run, self._patience, self._asks = trunk, run, patience, asks
        self._shape = tuple(shape)
        self._hidden = EXACT.encode(torch.randn(*shape, generator=torch.Generator().manual_seed(0)))
        self._incarnation = trunk.status().incarnation

    def _send(self, client: int, step: int, what: str) -> Any:
        """Sends hidden states, a gradient, or, where `what` is "question", asks whether there is room for them."""
        from fedsplit.wire.packets import Packet, StepKey

        key = StepKey(1, client, step, run=self._run)
        if what == "question":
            return self.trunk.send(Packet(key, incarnation=self._incarnation, shape=self._shape))
        return self.trunk.send(Packet(key, {what: self._hidden}, incarnation=self._incarnation))

    def _ask(self, clients: Sequence[int], step: int) -> list[int]:
        """Those of the clients that may send."""
        questions = [(client, self._send(client, step, "question")) for client in clients]
        return [client for client, answer in questions if not answer().wait]

    def step(self, clients: Sequence[int], step: int) -> dict[str, Any]:
        """All of them make a step, in as many waves as the trunk's memory asks for.

        Returns:
            Seconds, waves, clients served, the most forwards that were pending, and resident memory then.
        """
        started = served_at = time.perf_counter()
        from fedsplit.trunk.forwards import WAIT_SECONDS

        waiting, waves, vain, most, resident = list(clients), 0, 0, 0, 0
        while waiting:
            allowed = self._ask(waiting, step) if self._asks else waiting
            sent = [(client, self._send(client, step, "hidden")) for client in allowed]
            answers = [(client, answer()) for client, answer in sent]
            status = self.trunk.status()
            most, resident = max(most, status.pending), max(resident, status.resident_memory)
            served = [client for client, answer in answers if not answer.wait]
            for answer in [self._send(client, step, "gradient") for client in served]:
                answer()
            waiting = sorted(set(waiting) - set(served))
            waves += 1
            vain = 0 if served else vain + 1
            if served:
                served_at = time.perf_counter()
            elif vain >= VAIN and time.perf_counter() - served_at > self._patience:
                break
            if waiting:
                time.sleep(WAIT_SECONDS)
        return {
            "seconds": time.perf_counter() - started,
            "waves": waves,
            "served": len(clients) - len(waiting),
            "pending": most,
            "resident": resident,
        }


def _use(case: Mapping[str, Any], model: Mapping[str, Any], folder: str, steps: int, patience: float) -> dict[str, Any]:
    """Starts an actor on the cluster there is, and has the case's clients ask it."""
    from fedsplit.settings.documents import build
    from fedsplit.trunk.actor import ActorSetup
    from fedsplit.trunk.ray_trunks import start_trunks

    sizes = {"train.batch_size": model["batch_size"], "train.max_length": model["max_length"]}
    schedule = "copies" if case["kind"] == "copies" else "shared"
    trunk_settings = {"trunk.schedule": schedule, "trunk.memory": case["budget"], "trunk.lease": 3600}
    config = build({"model": folder, "cut": model["cut"], "clients": case["clients"], **sizes, **trunk_settings})
    name = f"trunk-{os.getpid()}-{time.time_ns()}"
    trunk = start_trunks(config, name, ActorSetup(plan(config).trunk_threads))
    before = trunk.status()
    found: dict[str, Any] = {
        "budget_bytes": config.trunk.memory_bytes,
        "least": before.least_memory,
        "before": before.resident_memory,
        "adapter": 4 * before.parameters["trainable"],
        "steps": [],
    }
    if config.trunk.memory_bytes and before.least_memory > config.trunk.memory_bytes:
        return found | {"refused": True}
    crowd = Crowd(
        trunk, name, (model["batch_size"], model["max_length"], model["width"]), patience, bool(case["budget"])
    )
    clients = range(case["clients"])
    if case["kind"] == "copies":
        for client in clients:
            crowd.step([client], 0)
            trunk.leave(client)
    else:
        for step in range(steps):
            found["steps"].append(crowd.step(clients, step))
            if found["steps"][-1]["served"] < len(clients):
                break
    after, tree = trunk.status(), Tree(os.getpid())
    found |= {"after": after.resident_memory, "peak": after.peak_memory, "high_water": tree.peak_memory["trunk"]}
    return found | {"counts": trunk.end_round(list(clients)).document()}


def measure(case: Mapping[str, Any], model: Mapping[str, Any], folder: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measures one case, on a cluster of its own."""
    from fedsplit.trunk import cluster

    with cluster.running(workers=1):
        return {**case, **_use(case, model, folder, args.steps, args.patience)}


def predict(records: Sequence[Mapping[str, Any]], case: Mapping[str, Any]) -> float:
    """The peak that a case will come to, by the line through the two largest of its series.

    Two are measured first, whatever they take; a crowd of 512 can take more than the machine has. What has a budget
    is always measured, since whether it is kept to is the question.
    """
    if case["kind"] == "budget":
        return 0.0
    same = [r for r in records if all(r[key] == case[key] for key in ("model", "kind", "budget")) and "peak" in r]
    if len(same) < 2:
        return 0.0 if case["clients"] <= SAFE or case["kind"] != "crowd" else math.inf
    (n0, p0), (n1, p1) = sorted((r["clients"], r["peak"]) for r in same)[-2:]
    return p1 + (p1 - p0) / (n1 - n0) * (case["clients"] - n1)


def cases(models: Sequence[str], clients: Sequence[int], budgets: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """What is measured, in order."""
    for model in models:
        for kind in KINDS:
            budget = budgets.get(model, "") if kind == "budget" else ""
            if budget or kind != "budget":
                yield from ({"model": model, "kind": kind, "budget": budget, "clients": n} for n in clients)


def _line(record: Mapping[str, Any]) -> str:
    label = f"{record['model']} {record['kind']} {record['budget'] or 'no budget'}, {record['clients']} clients: "
    if "needs" in record:
        return f"{label}not run: would need about {record['needs'] / 1e9:.1f} GB"
    if record.get("refused"):
        return f"{label}refused: at least {record['least'] / 1e6:.0f} MB"
    steps = ", ".join(
        f"{s['seconds']:.2f} s ({s['waves']} waves, {s['pending']} pending, {s['served']} served)"
        for s in record["steps"]
    )
    sizes = "  ".join(f"{k} {record[k] / 1e6:.0f}" for k in ("before", "after", "peak", "high_water", "least"))
    return f"{label}MB: {sizes}; {steps}; {record['counts']}"


def _pairs(text: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in text.split(",") if pair)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "memory.json")
    parser.add_argument("--cache", type=Path, default=Path("runs/speed-cache"), help="where random models are kept")
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(BUDGETS))
    parser.add_argument("--clients", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 64, 512])
    parser.add_argument("--budgets", type=_pairs, default=BUDGETS, help="MODEL=MEMORY,…; a model not named has none")
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(KINDS))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--patience", type=float, default=60, help="seconds after which nobody served is for ever")
    parser.add_argument("--cap", default="8GB", help="cases that would take more are not run")
    args = parser.parse_args()
    prepare()  # before Ray is imported, which reads it then
    cap = TrunkSettings(memory=args.cap).memory_bytes
    if cap is None:
        parser.error(f"--cap: {args.cap} is no size, such as 8GB")
    if max(args.clients) > SAFE and sum(n <= SAFE for n in args.clients) < 2 and "crowd" in args.kinds:
        parser.error(f"--clients: two numbers up to {SAFE} first, to tell what more of them would take")
    models = tomllib.loads(MODELS.read_text())["models"]
    records: list[dict[str, Any]] = []
    for case in cases(args.models, sorted(args.clients), args.budgets):
        if case["kind"] not in args.kinds:
            continue
        needs = predict(records, case)
        if needs > min(cap, psutil.virtual_memory().available * 0.9):
            record = {**case, "needs": needs}
        else:
            record = measure(case, models[case["model"]], folder_of(models[case["model"]], args.cache), args)
        records.append(record)
        print(_line(record), flush=True)
        args.out.write_text(json.dumps({"machine": machine(), "cap": cap, "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
