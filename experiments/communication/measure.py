"""Full fine-tuning beside LoRA, and a federation of whole models beside a split one: parameters, bytes and memory.

    python -m experiments.communication.measure --cache runs/estimate-cache

Writes result.json and the tables in README.md beside this file. What result.json has is not measured again. Memory is
measured in a process of its own for each party, which makes three training steps. Bytes of a split run are those of its
summary.json. Without a cut, nothing crosses at a step, and the trained tensors cross once a round in each direction.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.communication.report import text
from experiments.estimate.measure import peak
from experiments.estimate.models import model_of
from experiments.speed.report import write_between
from experiments.speed.run import machine

HERE = Path(__file__).parent
STEPS = 3
PARTIES: dict[str, tuple[Any, ...]] = {
    "whole": ("bottom", "trunk", "top"),
    "client": ("bottom", "top"),
    "trunk": ("trunk",),
}
"""The parts that a process holds; `whole` is the model without a cut."""


def trainings(model: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What is trained: all weights, or adapters of two ranks on two sets of projections."""
    yield {"training": "full"}
    for rank in (8, 16):
        for where in ("attention", "everything"):
            yield {"training": "lora", "rank": rank, "where": where, "targets": model[where]}


def settings_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run."""
    settings = {
        "model": record["folder"],
        "cut": record["cut"],
        "train.batch_size": record["batch_size"],
        "train.max_length": record["max_length"],
        "train.micro_batches": 1,
    }
    if record["training"] == "lora":
        settings |= {"lora.rank": record["rank"], "lora.targets": record["targets"]}
    return settings


def held(record: Mapping[str, Any]) -> dict[str, Any]:
    """Loads a party, makes steps, and measures. Called in a process of its own."""
    import torch
    from safetensors.torch import save_file

    from fedsplit.adaptation import lora
    from fedsplit.adaptation.run_adapters import adapt, bare_parts
    from fedsplit.federation.messages import serialised_bytes
    from fedsplit.settings.documents import build

    torch.set_num_threads(1)
    config = build(settings_of(record))
    parts = bare_parts(config, list(PARTIES[record["party"]]))
    for part in parts:
        if record["training"] == "lora":
            adapt(part, config)
        else:
            part.requires_grad_(True)
        part.train()
    # By identity: parts that are loaded together share a tied head.
    trained: dict[str, Any] = {}
    seen: set[int] = set()
    total = 0
    for part in parts:
        for name, parameter in part.named_parameters():
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            total += parameter.numel()
            if parameter.requires_grad:
                trained[lora.exported_name(part, name)] = parameter
    optimizer = torch.optim.AdamW(trained.values(), fused=True)
    for _ in range(STEPS):
        step(parts, config)
        optimizer.step()
        gradients = sum(parameter.grad.nbytes for parameter in trained.values() if parameter.grad is not None)
        optimizer.zero_grad()
    moments = 0
    for state in optimizer.state.values():
        moments += sum(value.nbytes for value in state.values() if value.ndim)
    values = {name: parameter.detach() for name, parameter in trained.items()}
    with tempfile.TemporaryDirectory() as folder:
        highest = peak()  # before the file is written
        save_file({name: value.contiguous().clone() for name, value in values.items()}, Path(folder, "it"))
        file = Path(folder, "it").stat().st_size
    return {
        "parameters": total,
        "trainable": sum(value.numel() for value in values.values()),
        "gradients": gradients,
        "moments": moments,
        "file": file,
        "message": serialised_bytes(values),
        "peak": highest,
    }


def step(parts: list[Any], config: Any) -> None:
    """A forward and a backward through the parts that are here; what comes from elsewhere is random."""
    import torch

    rows, length = config.train.batch_size, config.train.max_length
    ids = torch.randint(0, 1000, (rows, length))
    kinds = [part.kind for part in parts]
    if kinds == ["trunk"]:
        hidden = torch.randn(rows, length, parts[0].config.hidden_size, requires_grad=True)
        output = parts[0](hidden)
        output.backward(torch.randn_like(output))
    elif kinds == ["bottom", "top"]:
        sent = parts[0](ids)
        received = torch.randn(sent.shape, requires_grad=True)
        parts[1](received, ids).backward()
        sent.backward(received.grad)
    else:
        bottom, trunk, top = parts
        top(trunk(bottom(ids)), ids).backward()


def crossed(record: Mapping[str, Any], clients: int) -> dict[str, Any]:
    """The bytes of a split run of two rounds of one step, by its summary."""
    from fedsplit.engines.in_process import federate
    from fedsplit.federation.strategy import load_strategy
    from fedsplit.settings.documents import build

    settings = {
        **settings_of(record),
        "clients": clients,
        "rounds": 2,
        "train.steps": 1,
        "eval.samples": 1,
        "eval.after": 0,
        "dataset": "synthetic",
        "engine": "local",
        "report": False,
    }
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        federation = federate(build(settings), run, load_strategy("fedavg", {}, {}))
        assert federation.summary is not None
        file = (run / "adapter" / "adapter_model.safetensors").stat().st_size
        return {"bytes": federation.summary["bytes"], "steps": 2 * clients, "adapter_file": file}


def in_a_process(record: Mapping[str, Any]) -> dict[str, Any]:
    """Measures a party in a process of its own."""
    threads = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    call = [sys.executable, "-m", "experiments.communication.measure", "--hold", json.dumps(record)]
    done = subprocess.run(call, capture_output=True, text=True, env={**os.environ, **threads})
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("runs/estimate-cache"), help="where random models lie")
    parser.add_argument("--folder", type=Path, default=HERE, help="where README.md and result.json are")
    parser.add_argument("--hold", default="", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.hold:
        print(json.dumps(held(json.loads(asked.hold))))
        return
    document = tomllib.loads((HERE / "config.toml").read_text())
    for name, model in document["models"].items():
        common = {"model": name, "cut": model["cut"], "folder": model_of(name, model, asked.cache)}
        common |= {key: document[key] for key in ("batch_size", "max_length")}
        for training in trainings(model):
            for party in (*PARTIES, "run"):
                record = {**common, **training, "party": party}
                if party == "run" and training["training"] == "full":  # a run trains adapters alone
                    continue
                if _key(record) in {_key(one) for one in _records(asked.folder)}:
                    continue
                found = crossed(record, document["clients"]) if party == "run" else in_a_process(record)
                _keep({**record, **found}, asked.folder)
    if (asked.folder / "README.md").exists():
        result = json.loads((asked.folder / "result.json").read_text())
        write_between(asked.folder / "README.md", "result.json", text(result))


def _key(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(record.get(name) for name in ("model", "training", "rank", "where", "party"))


def _records(folder: Path) -> list[dict[str, Any]]:
    file = folder / "result.json"
    return json.loads(file.read_text())["records"] if file.exists() else []


def _keep(record: dict[str, Any], folder: Path) -> None:
    """Adds a record to the result."""
    del record["folder"]
    print(record, flush=True)
    result = {"machine": machine(), "records": [*_records(folder), record]}
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
