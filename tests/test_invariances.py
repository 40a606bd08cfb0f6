"""What must not change a run, and what a run must equal, through the command itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import write_corpus
from safetensors.torch import load_file
from test_client import central

from fedsplit.adaptation import lora
from fedsplit.commands import simulate
from fedsplit.corpora.partition import shards_of
from fedsplit.model.split import load_parts
from fedsplit.settings.documents import build

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_ray")]

BASE = {
    "cut": "1:2",
    "clients": 2,
    "rounds": 2,
    "partition": "natural",
    "lora.rank": 2,
    "lora.dropout": 0,
    "kernels": "library",
    "train.steps": 3,
    "train.max_length": 16,
    "train.micro_batches": 1,
    "threads": 1,
    "trunk.schedule": "copies",
}
"""Without what would round or draw differently; AdamW makes a rounding of a small gradient a whole step."""

Run = tuple[dict[str, torch.Tensor], dict]


def run(out: Path, values: dict[str, object]) -> Run:
    """The adapter and the summary that the command leaves."""
    flags = [f"--{name.replace('_', '-')}" for name in values]
    assert (
        simulate.main(
            [word for pair in zip(flags, map(str, values.values()), strict=True) for word in pair] + ["--out", str(out)]
        )
        == 0
    )
    return load_file(out / "adapter" / "adapter_model.safetensors"), json.loads((out / "summary.json").read_text())


def test_accumulated_batches_are_a_large_batch(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    values = BASE | {"model": tiny_models["llama"], "dataset": write_corpus(tmp_path / "corpus.jsonl")}
    values |= {"train.optimizer": "sgd", "train.lr": 0.1}
    large, summary = run(tmp_path / "large", values | {"train.batch_size": 4})
    small, other = run(tmp_path / "small", values | {"train.batch_size": 2, "train.accumulation": 2})
    assert other["tokens"] == summary["tokens"]
    assert other["eval_loss"]["after"] == pytest.approx(summary["eval_loss"]["after"], abs=1e-6)
    assert abs(summary["eval_loss"]["after"] - summary["eval_loss"]["before"]) > 1e-4
    for name, tensor in large.items():
        assert torch.allclose(tensor, small[name], atol=2e-6), name


def test_packing_is_padding_where_texts_fill_sequences(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Texts of fifteen characters and the end token, in sequences of sixteen: the same run to the bit."""
    rows = [{"text": f"{owner} said {n:06}", "owner": owner} for owner in ("ann", "bob") for n in range(8)]
    (tmp_path / "full.jsonl").write_text("\n".join(map(json.dumps, rows)))
    values = BASE | {"model": tiny_models["gpt2"], "dataset": tmp_path / "full.jsonl", "train.batch_size": 2}
    packed, one = run(tmp_path / "packed", values | {"data.packing": "true"})
    padded, two = run(tmp_path / "padded", values | {"data.packing": "false"})
    assert all(torch.equal(tensor, padded[name]) for name, tensor in packed.items())
    for what in ("eval_loss", "tokens", "bytes"):
        assert one[what] == two[what]


def test_one_client_is_central_training(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Plain PEFT, torch's optimiser and transformers' schedule on the unsplit model, over two rounds."""
    path = tiny_models["llama"]
    values = BASE | {"model": path, "dataset": write_corpus(tmp_path / "corpus.jsonl"), "clients": 1}
    values |= {"train.batch_size": 3, "train.lr": 5e-3, "train.schedule": "cosine", "train.warmup": 0.5}
    values |= {"train.optimizer_state": "keep"}
    config = build({name: value if isinstance(value, int | float) else str(value) for name, value in values.items()})
    parts = load_parts(path, config.bounds, ["bottom", "trunk", "top"])
    for part in parts:
        lora.add(part, config.lora, config.seed)
    start = lora.read(*parts).tensors
    plain = central(path, start, shards_of(config)[0].train, config.train, config.rounds)
    federated, _ = run(tmp_path / "run", values)
    for name, tensor in plain.items():
        assert (federated[f"base_model.model.{name}"] - tensor).abs().max() <= 1e-5, name
        assert (start[name] - tensor).abs().max() > 1e-3, name
