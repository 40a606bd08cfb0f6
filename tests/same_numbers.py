"""A dozen small federations, and the digest of every number that they leave: a change that moves no number shows it.

`python -m tests.same_numbers --write` records them. `tests/test_same_numbers.py` compares.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

RECORD = Path(__file__).with_suffix(".json")

ROUNDS = 2

BASE: dict[str, object] = {
    "model": "gpt2",
    "clients": 3,
    "rounds": ROUNDS,
    "cut": "1:2",
    "partition": "natural",
    "lora.rank": 2,
    "lora.alpha": 3.0,
    "train.steps": 3,
    "train.batch_size": 2,
    "train.max_length": 16,
    "train.lr": 0.02,
}

CASES: dict[str, dict[str, object]] = {
    "shared": {},
    "batched": {"trunk.schedule": "batched"},
    "accumulate": {"trunk.schedule": "accumulate", "trunk.every": 2},
    "copies": {"trunk.schedule": "copies", "trunk.order": "cyclic"},
    "frozen": {"trunk.schedule": "frozen"},
    "llama": {"model": "llama", "kernels": "library", "train.micro_batches": 2},
    "experts": {"model": "mixtral", "router_aux_loss": 0.1},
    "fold": {"strategy": "flora", "trunk.schedule": "copies", "lora.rank": "2,3"},
    "fold-and-average": {"strategy": "fedex", "model": "llama"},
    "personal-factors": {"strategy": "fedsa", "share": "bottom,trunk"},
    "control-variates": {"strategy": "scaffold", "fraction": 0.7},
    "mixed-ranks": {"strategy": "hetlora", "lora.rank": "2,4,3"},
    "late": {"strategy": "fedbuff", "strategy.delays": "1,2"},
    "prompt": {"prompt.kind": "prompt"},
    "prefix": {"prompt.kind": "prefix", "model": "llama"},
    "classes": {"data.format": "classification", "dataset": "synthetic", "partition": "iid"},
    "head": {"lm_head": "full", "train.optimizer": "sgd", "train.momentum": 0.9, "train.optimizer_state": "keep"},
    "accumulation": {"train.accumulation": 2, "train.clip": 0.05, "train.schedule": "cosine", "train.warmup": 0.2},
    "padded": {"data.packing": "false", "train.epochs": 1},
    "resumed": {"strategy": "fedadam", "trunk.schedule": "copies"},
}
"""Settings by case, beside those of `BASE`."""


def machine() -> dict[str, str]:
    """What decides how sums are rounded: another processor or torch gives other last bits.

    Processors of one name may differ in model and in instructions, as virtual machines do.
    """
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = dict(reversed([line.partition(":")[::2] for line in lines if ":" in line]))  # the first processor's
    cpu = {name.strip(): value.strip() for name, value in facts.items()}
    kind = " ".join(cpu.get(name, "") for name in ("model name", "cpu family", "model", "stepping"))
    instructions = " ".join(sorted(flag for flag in cpu.get("flags", "").split() if "avx" in flag or "fma" in flag))
    return {"torch": torch.__version__, "cpu": kind.strip() or platform.machine(), "instructions": instructions}


def play(
    case: str, models: Mapping[str, Path], corpus: Path, out: Path, more: Mapping[str, object] | None = None
) -> dict[str, Any]:
    """Runs a case's federation in this process.

    Args:
        case: One of `CASES`.
        models: Folders of tiny models by family.
        corpus: A small corpus of three owners.
        out: The run's folder.
        more: Settings beside those of the case.

    Returns:
        The digest and the norm of each file of tensors that the run left, and the losses of each round.
    """
    from fedsplit.engines.in_process import federate
    from fedsplit.federation.aggregation import strategy_defaults
    from fedsplit.federation.strategy import load_strategy
    from fedsplit.settings.documents import build

    values = {**BASE, "dataset": str(corpus), **CASES[case], **(more or {})}
    options = {name.partition(".")[2]: values.pop(name) for name in list(values) if name.startswith("strategy.")}
    values["model"] = str(models[str(values["model"])])
    steps = [{"rounds": 1}, {"resume": str(out)}] if case == "resumed" else [{}]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for step in steps:
            config = build({**values, **step}, options)
            federate(config, out, load_strategy(config.strategy, options, strategy_defaults(config)))
    finally:
        torch.set_num_threads(threads)
    return {"files": _digests(out), "norms": norms(out), "losses": _losses(out)}


def _digests(out: Path) -> dict[str, str]:
    """One digest for each file of tensors: of their names, types, shapes and bytes."""
    found = {}
    for file in sorted(out.rglob("*.safetensors")):
        digest = hashlib.sha256()
        for name, tensor in sorted(load_file(file).items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        found[str(file.relative_to(out))] = digest.hexdigest()
    return found


def norms(out: Path) -> dict[str, float]:
    """The norm of all numbers in each file of tensors, summed in float64."""
    found = {}
    for file in sorted(out.rglob("*.safetensors")):
        squares = [tensor.double().square().sum() for tensor in load_file(file).values()]
        found[str(file.relative_to(out))] = float(sum(squares)) ** 0.5
    return found


def _losses(out: Path) -> list[float]:
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [event["loss"] for event in events if event.get("loss") is not None]


def record() -> dict[str, Any]:
    """All cases, and the machine that played them."""
    from conftest import write_corpus, write_model

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        models = {family: write_model(root / family, family) for family in ("gpt2", "llama", "mixtral")}
        corpus = write_corpus(root / "corpus.jsonl")
        cases = {case: play(case, models, corpus, root / f"run-{case}") for case in CASES}
    return {"machine": machine(), "cases": cases}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the record")
    asked = parser.parse_args()
    sys.path[:0] = ["tests"]
    found = json.dumps(record(), indent=1) + "\n"
    if asked.write:
        RECORD.write_text(found)
    else:
        print(found)
