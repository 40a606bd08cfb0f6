"""Data sets of a few short texts, divided among clients."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from fedsplit.corpora.partition import make_partition
from fedsplit.corpora.sharding import Partition
from fedsplit.corpora.shards import Shard
from fedsplit.settings.config import BUNDLED_MODEL
from fedsplit.settings.sections import DataSettings


def shards(dataset: str, spec: str, clients: int, length: int = 64, seed: int = 0) -> list[Shard]:
    return make_partition(dataset, spec, clients, length, seed, BUNDLED_MODEL, end=0).shards


def deal(path: Path, spec: str, clients: int, model: Path, length: int = 16, **settings: str) -> Partition:
    return make_partition(str(path), spec, clients, length, 0, model, 0, DataSettings(**settings))


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def rows(*tensors: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for tensor in tensors for row in tensor.tolist()]


def write_mixed(folder: Path) -> Path:
    """Writes sixty short texts that differ, of three owners and two topics."""
    rows = [
        {"text": f"text {n:02} " * 2, "owner": "abc"[n % 3], "topic": ["sun", "sea"][n // 30], "n": str(n)}
        for n in range(60)
    ]
    return write(folder / "mixed.jsonl", rows)
