"""Folders of runs that nobody has played, with the files that a report reads."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import tomli_w

from fedsplit.settings.documents import as_document, build

HOSTILE = "<script>alert(1)</script> & $x_1$ \\frac"
"""A client's name that no page, table or figure may take for anything but a name."""


def cost(round: int, names: list[str], seconds: float) -> dict[str, Any]:
    """The event `cost` of a round."""
    trained = dict.fromkeys(names, 64) if round else {}
    sent = {"activation_up": 1000 * bool(round), "activation_down": 1000 * bool(round), "evaluation_up": 500}
    return {
        "event": "cost",
        "round": round,
        "bytes": sent,
        "client_bytes": {kind: dict.fromkeys(names, count // len(names)) for kind, count in sent.items()},
        "seconds": {"training": seconds, "evaluation": 0.5, "other": 0.25},
        "client_seconds": {"training": dict.fromkeys(trained, seconds), "evaluation": dict.fromkeys(names, 0.1)},
        "tokens": 64 * len(trained),
        "client_tokens": trained,
        "tokens_per_second": 640.0 if round else None,
        "client_tokens_per_second": dict.fromkeys(trained, 64 / seconds),
        "client_peak_memory": dict.fromkeys(names, 10**8),
        "elapsed": 2.0 + round * seconds,
    }


def events_of(names: list[str], rounds: int, gain: float) -> list[dict[str, Any]]:
    """The events of a run whose loss falls by `gain` a round."""
    events: list[dict[str, Any]] = []
    for round in range(rounds + 1):
        loss = 3.0 - gain * round
        if round:
            trained = {"loss": loss + 0.1, "clients": dict.fromkeys(names, loss), "learning_rate": 0.01}
            events.append({"event": "train", "round": round, "tokens": 64, "elapsed": 1.0, **trained})
            layers = {f"h.{block}.attn": 0.02 for block in range(3)}
            events.append({"event": "aggregate", "round": round, "error": 0.02, "layers": layers})
        forgotten = dict.fromkeys(names, -0.01) if round else {}
        measured = {"loss": loss, "clients": dict.fromkeys(names, loss), "forgotten": forgotten, "tokens": 8}
        events.append({"event": "evaluate", "round": round, "elapsed": 1.0, "time": "2030-01-02T03:04:05", **measured})
        events.append(cost(round, names, seconds=1.5))
    return events


def summary_of(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The summary of a run with some events."""
    losses = [event["loss"] for event in events if event["event"] == "evaluate"]
    crossed: Counter[str] = Counter()
    for event in events:
        crossed.update(event["bytes"] if event["event"] == "cost" else {})
    return {
        "complete": True,
        "last_round": events[-1]["round"],
        "eval_loss": {"before": losses[0], "after": losses[-1]},
        "bytes": crossed,
        "peak_memory": {"client": 10**8, "trunk": 2 * 10**8},
        "adapter_norms": {f"h.{block}.attn": 0.5 + block for block in range(3)},
        "wall_seconds": 7.5,
        "tokens_per_second": 640.0,
        "aggregation_error": 0.02,
        "parameters": {"trunk": {"total": 100, "trainable": 10}},
        "date": "2030-01-02T03:04:05+00:00",
        "versions": {"fedsplit": "0.1.0", "torch": "2"},
        "git": {"commit": "abc123", "dirty": True},
        "host": {"cores": 2, "system": "Linux", "machine": "x86_64"},
    }


def write_run(
    folder: Path, names: tuple[str, ...] = ("ann", "bob", HOSTILE), rounds: int = 2, gain: float = 0.1, **settings: Any
) -> Path:
    """Writes the folder of a finished run, and returns it."""
    folder.mkdir(parents=True)
    config = build({"clients": len(names), "rounds": rounds, "engine": "local", **settings})
    (folder / "config.toml").write_text(tomli_w.dumps(as_document(config)))
    events = events_of(list(names), rounds, gain)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "summary.json").write_text(json.dumps(summary_of(events)))
    clients = []
    for number, name in enumerate(names):
        counts = {"sequences": 10 + number, "tokens": 100, "predicted": 90}
        shares = {"red": 6, "blue": 4 + number}
        clients.append({"client": number, "name": name, "train": counts, "held_out": counts, "shares": shares})
    (folder / "data.json").write_text(json.dumps({"format": "text", "by": "colour", "clients": clients}))
    return folder
