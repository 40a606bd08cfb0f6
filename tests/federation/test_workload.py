"""What honest clients count is exactly what the server expects, in several formats and ways to go through the data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from local_federation import federate

from fedsplit.corpora.partition import partition_of
from fedsplit.federation.workload import Workload, workloads
from fedsplit.settings.config import Config
from fedsplit.settings.documents import build
from strategies.fedavg import FedAvg

ROWS: dict[str, dict[str, Any]] = {
    "text": {"text": "some words that are long enough for more than one sequence"},
    "completion": {"prompt": "question", "completion": "answer"},
    "classification": {"text": "some words", "label": "good"},
    "preference": {"prompt": "question", "chosen": "answer", "rejected": "other"},
}


def config_of(model: Path, folder: Path, format: str = "text", **settings: Any) -> Config:
    """Two clients with eleven rows of different lengths."""
    rows = [dict(ROWS[format]) for _ in range(11)]
    for number, row in enumerate(rows):
        if format == "classification":
            row |= {"label": ("good", "bad")[number % 2], "text": row["text"] + "!" * number}
        elif format == "completion":
            row["completion"] += "!" * number
        elif format == "preference":
            row["chosen"] += "!" * number
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    values: dict[str, Any] = {"clients": 2, "rounds": 1, "model": str(model), "cut": "1:2", "dataset": str(file)}
    values |= {"partition": "iid", "data.format": format, "lora.rank": 2, "trunk.schedule": "copies"}
    values |= {"train.max_length": 32, "train.batch_size": 2, "train.steps": 2, "eval.samples": 3, "eval.after": 1}
    return build({**values, **settings})


@pytest.mark.parametrize(
    ("settings", "examples"),
    [
        ({"train.steps": 3, "train.accumulation": 2}, [12, 12]),
        ({"train.epochs": 2}, None),
        ({"train.epochs": 3, "train.samples": 2}, [6, 6]),
        ({"train.epochs": 1, "train.samples": 10**6}, None),
    ],
    ids=str,
)
def test_examples_are_those_of_steps_or_of_passes(
    settings: dict[str, Any], examples: list[int] | None, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    config = config_of(tiny_models["gpt2"], tmp_path, **settings)
    shards = partition_of(config).shards
    expected = examples or [config.train.epochs * len(shard.train) for shard in shards]
    found = workloads(config, [shard.size for shard in shards])
    assert [work.examples for work in found] == expected
    assert [work.tokens for work in found] == [32 * count for count in expected]


def test_predictions_are_those_of_the_sequences_that_are_evaluated(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """The first token of a sequence is not predicted; a class counts once; samples are of whole batches."""
    config = config_of(tiny_models["gpt2"], tmp_path)
    (shard, _) = partition_of(config).shards
    shard = replace(shard, held_out=shard.train[[0] * 5])
    assert workloads(config, [shard.size]) == [Workload(4, 4 * 32, 3 * 31, 2 * 31, 2)]
    assert workloads(config, [replace(shard, classes=2).size]) == [Workload(4, 4 * 32, 3, 2, 2)]
    none = replace(config, eval=replace(config.eval, samples=9, after=0))
    assert workloads(none, [shard.size]) == [Workload(4, 4 * 32, 5 * 31, 0, 2)]


@pytest.mark.parametrize(
    ("format", "settings"),
    [
        ("text", {}),
        ("text", {"data.packing": "false", "train.epochs": 2, "train.accumulation": 2}),
        ("text", {"train.epochs": 1, "train.samples": 3, "eval.after": 0}),
        ("text", {"prompt.kind": "prompt", "prompt.tokens": 3, "train.max_length": 16}),
        ("completion", {"train.epochs": 2}),
        ("completion", {"data.packing": "true"}),
        ("classification", {"train.epochs": 1}),
    ],
    ids=str,
)
def test_nobody_honest_is_left_out(
    format: str, settings: dict[str, Any], tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tiny_models["gpt2"], tmp_path, format, **settings)
    _, lines = federate(config, tmp_path / "run", FedAvg(), monkeypatch)
    assert not [line for line in lines.lines if "left out" in line]
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(len(event["clients"]) == 2 for event in events if event["event"] in ("train", "evaluate"))
