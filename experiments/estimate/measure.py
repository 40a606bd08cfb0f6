"""Estimated memory beside the measured peak of a client's and of the trunk's process.

    python -m experiments.estimate.measure --cache runs/estimate-cache

Writes result.json and the table in README.md beside this file. What result.json has is not measured again. Every
measurement is a process of its own. It imports what a process of the role imports, loads the parts, and makes
three training steps with an optimiser. A client has embedded every token before, as in a long run: of an embedding
that stays mapped from its file, only the rows that were read are in memory. The peak is the largest resident memory by
Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.estimate.models import model_of
from experiments.speed.report import conditions, table, write_between
from experiments.speed.run import machine

HERE = Path(__file__).parent
KINDS: dict[str, tuple[Any, ...]] = {"client": ("bottom", "top"), "trunk": ("trunk",)}
STEPS = 3


def settings_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run, by a record of what is measured."""
    return {
        "model": record["folder"],
        "cut": record["cut"],
        "dtype": record["dtype"],
        "train.batch_size": record["batch_size"],
        "train.max_length": record["max_length"],
        "train.micro_batches": 1,
    }


def estimated(record: Mapping[str, Any]) -> dict[str, float]:
    """What the estimate says about a record's party."""
    from fedsplit.estimation.party_memory import client_memory, trunk_memory
    from fedsplit.estimation.party_shapes import Parties
    from fedsplit.settings.documents import build

    parties = Parties(build(settings_of(record)))
    memory = client_memory(parties) if record["role"] == "client" else trunk_memory(parties)
    return {"estimated": memory.peak, "without_libraries": memory.peak - memory.libraries, "weights": memory.weights}


def peak() -> int:
    """The largest resident memory of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def measured(record: Mapping[str, Any]) -> dict[str, int]:
    """Loads a party, makes steps, and returns the peak. Called in a process of its own."""
    import torch

    from fedsplit.adaptation import lora
    from fedsplit.adaptation.run_adapters import adapt, bare_parts
    from fedsplit.optimization import optim
    from fedsplit.settings.documents import build

    # What a process of this role imports anyhow, needed here or not.
    __import__("fedsplit.engines.client_app" if record["role"] == "client" else "fedsplit.trunk.actor")
    torch.set_num_threads(1)
    config = build(settings_of(record))
    parts = bare_parts(config, list(KINDS[record["role"]]))
    for part in parts:
        adapt(part, config)
        part.train()
    trained = [parameter for part in parts for parameter in lora.parameters(part).values()]
    optimizer = optim.make_optimizer(trained, config.train)
    if record["role"] == "client":
        _embed_every_token(parts[0], config)
    for _ in range(STEPS):
        _step(parts, config)
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
    return {"measured": peak()}


def _embed_every_token(bottom: Any, config: Any) -> None:
    """Sends batches with all tokens of the vocabulary through the bottom."""
    import torch

    size = config.train.batch_size * config.train.max_length
    batches = -(-bottom.config.vocab_size // size)
    tokens = torch.arange(batches * size) % bottom.config.vocab_size
    with torch.no_grad():
        for ids in tokens.view(batches, config.train.batch_size, config.train.max_length):
            bottom(ids)


def _step(parts: list[Any], config: Any) -> None:
    """A forward and a backward; what comes from the other side is random."""
    import torch

    from fedsplit.model.devices import TYPES

    rows, length = config.train.batch_size, config.train.max_length
    ids = torch.randint(0, 1000, (rows, length))
    if len(parts) == 2:
        bottom, top = parts
        sent = bottom(ids)
        received = torch.randn(sent.shape).to(sent.dtype).requires_grad_()
        top(received, ids).backward()
        sent.backward(received.grad)
        return
    width = parts[0].config.hidden_size
    hidden = torch.randn(rows, length, width).to(TYPES[config.dtype]).requires_grad_()
    output = parts[0](hidden)
    output.backward(torch.randn(output.shape).to(output.dtype))


def in_a_process(record: Mapping[str, Any]) -> dict[str, int]:
    """Measures a record in a process of its own."""
    threads = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    call = [sys.executable, "-m", "experiments.estimate.measure", "--hold", json.dumps(record)]
    done = subprocess.run(call, capture_output=True, text=True, env={**os.environ, **threads})
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def text(result: Mapping[str, Any]) -> str:
    """The table, and how far the estimates are off."""
    rows = []
    for record in result["records"]:
        off = record["estimated"] / record["measured"] - 1
        step = f"{record['batch_size']} x {record['max_length']}"
        megabytes = (f"{record[key] / 1e6:,.0f}" for key in ("weights", "estimated", "measured"))
        rows.append([record["model"], record["role"], record["dtype"], step, *megabytes, f"{off:+.1%}"])
    head = ["model", "process", "type", "step", "its weights", "estimated peak", "measured peak", "off by"]
    worst = max(abs(record["estimated"] / record["measured"] - 1) for record in result["records"])
    within = sum(abs(record["estimated"] / record["measured"] - 1) <= 0.1 for record in result["records"])
    count = len(result["records"])
    words = f"{within} of {count} estimates are within 10 % of the peak; the furthest is off by {worst:.1%}."
    return f"{conditions(result['machine'])}\n\n{chr(10).join(table(head, rows))}\n\n{words}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("runs/estimate-cache"), help="where random models lie")
    parser.add_argument("--folder", type=Path, default=HERE, help="where README.md and result.json are")
    parser.add_argument("--hold", default="", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.hold:
        print(json.dumps(measured(json.loads(asked.hold))))
        return
    document = tomllib.loads((HERE / "config.toml").read_text())
    records = _records(asked.folder)
    done = {tuple(record[key] for key in _KEYS): record["measured"] for record in records}
    found = []
    for name, model in document["models"].items():
        folder = model_of(name, model, asked.cache)
        for step in document["steps"]:
            for role in KINDS:
                record = {"model": name, "role": role, "cut": model["cut"], **step, "folder": folder}
                key = tuple(record[key] for key in _KEYS)
                peak = {"measured": done[key]} if key in done else in_a_process(record)
                # The estimate is always made anew: it takes a second, and the code may have changed.
                entry = {**record, **estimated(record), **peak}
                del entry["folder"]
                print(entry, flush=True)
                found.append(entry)
                result = {"machine": machine(), "records": found}
                (asked.folder / ".draft.json").write_text(json.dumps(result, indent=2) + "\n")
    (asked.folder / ".draft.json").rename(asked.folder / "result.json")
    if (asked.folder / "README.md").exists():
        write_between(asked.folder / "README.md", "result.json", text(result))


_KEYS = ("model", "role", "dtype", "batch_size", "max_length")


def _records(folder: Path) -> list[dict[str, Any]]:
    """What has been measured already; remove result.json to measure it again."""
    file = folder / "result.json"
    return json.loads(file.read_text())["records"] if file.exists() else []


if __name__ == "__main__":
    main()
