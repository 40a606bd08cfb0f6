"""The estimate's bytes are those that real runs count, to the byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedsplit.engines import in_process
from fedsplit.estimation.crossings import evaluation_sizes, sampled_batches, step_sizes
from fedsplit.estimation.party_shapes import Parties, Workload
from fedsplit.estimation.run_traffic import run_traffic
from fedsplit.events import Event, Sink
from fedsplit.federation.aggregation import strategy_defaults
from fedsplit.federation.strategy import load_strategy
from fedsplit.settings.documents import build

SMALL: dict[str, Any] = {
    "clients": 3,
    "rounds": 2,
    "engine": "local",
    "dataset": "synthetic",
    "train.steps": 2,
    "train.batch_size": 2,
    "train.micro_batches": 1,
    "train.max_length": 16,
    "eval.samples": 5,
    "eval.after": 3,
}


class Costs(Sink):
    """Remembers the bytes of each round."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, int]] = []

    def handle(self, event: Event) -> None:
        if event.name == "cost":
            self.rounds.append({kind: count for kind, count in event.bytes.items() if count})  # type: ignore[attr-defined]


def assert_equal(tmp_path: Path, settings: dict[str, Any], workload: Workload | None = None) -> None:
    """Plays a run, and compares its bytes with the estimate: round by round, and in all."""
    config = build({**SMALL, **settings})
    strategy = load_strategy(config.strategy, config.strategy_options, strategy_defaults(config))
    costs = Costs()
    federation = in_process.federate(config, tmp_path / "run", strategy, costs)
    estimated = run_traffic(Parties(config, workload))
    assert [dict(+traffic) for traffic in estimated.rounds] == costs.rounds
    assert federation.summary is not None
    assert dict(+estimated.run) == {kind: count for kind, count in federation.summary["bytes"].items() if count}


QUICK: list[dict[str, Any]] = [
    {},
    {"train.batch_size": 3, "train.micro_batches": 2, "train.accumulation": 2, "train.clip": 1.0},
    {"prompt.kind": "prompt", "prompt.tokens": 3},
    {"train.epochs": 1, "train.samples": 5},
    {"dtype": "bf16", "wire.codec": "raw", "trunk.schedule": "frozen", "cut": "0:5"},
]
"""A run of each is a second."""


@pytest.mark.parametrize("settings", QUICK, ids=str)
def test_bytes_are_those_of_a_run(settings: dict[str, Any], tmp_path: Path) -> None:
    assert_equal(tmp_path, settings, Workload(sequences=5))


MORE: list[dict[str, Any]] = [
    {"wire.codec": "bf16", "clients": 5, "fraction": 0.5, "rounds": 3, "strategy": "rolora"},
    {"wire.codec": "int8", "wire.gradient_up": "topk:0.25,int8"},
    {"wire.codec": "delta:0.1,int8"},  # no example comes twice in so short a run
    {"dtype": "fp16"},
    {"dtype": "bf16", "lora.method": "ln_tuning"},  # float32 adapters lie in the path of the hidden states
    {"trunk.schedule": "copies", "strategy": "flora", "lora.rank": "4,8,2"},
    {"trunk.schedule": "copies", "strategy": "fedavg", "train.clip": 1.0},
    {"trunk.schedule": "batched"},
    {"trunk.schedule": "accumulate", "trunk.every": 1, "train.accumulation": 2},
    {"trunk.schedule": "forward-only"},
    {"trunk.schedule": "frozen", "train.clip": 1.0},
    {"trunk.stages": "1:3:5", "train.clip": 1.0, "train.micro_batches": 2},
    {"prompt.kind": "prefix", "strategy": "fedadam"},
    {"lm_head": "full", "strategy": "ffa"},
    {"lm_head": "lora", "strategy": "fedsa"},
    {"strategy": "scaffold"},
    {"adapter.codec": "int4", "rounds": 3},
    {"adapter.codec": "topk:0.1,int8", "strategy": "flora", "lora.rank": "4,8,2", "trunk.schedule": "copies"},
    {"adapter.codec": "int8", "lm_head": "full"},
    {"objective": "distillation", "metric": "token_accuracy"},
    {"eval.every": 2, "eval.fraction": 0.5, "rounds": 3},
]
"""Schedules, strategies, codecs, stages, and what else decides about bytes."""


@pytest.mark.slow
@pytest.mark.parametrize("settings", MORE, ids=str)
def test_bytes_are_those_of_a_run_under_every_setting(settings: dict[str, Any], tmp_path: Path) -> None:
    assert_equal(tmp_path, settings)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe", "gemma3_text"])
def test_bytes_are_those_of_a_run_of_every_family(
    family: str, tiny_models: dict[str, Path], corpus_file: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"model": str(tiny_models[family]), "dataset": str(corpus_file), "cut": "1:2"}
    if family == "qwen3_moe":  # the routers' sums cross, too
        settings |= {"router_aux_loss": 0.01, "train.clip": 1.0, "train.micro_batches": 2}
    assert_equal(tmp_path, settings)


@pytest.mark.slow
def test_bytes_are_those_of_a_classifier(tmp_path: Path) -> None:
    rows = "\n".join(f'{{"text": "{"word " * 40}", "label": "{"abc"[n % 3]}"}}' for n in range(60))
    file = tmp_path / "texts.jsonl"
    file.write_text(rows)
    settings = {"dataset": str(file), "data.format": "classification", "partition": "iid", "eval.samples": 2}
    assert_equal(tmp_path, settings, Workload(classes=3))


def test_a_step_has_the_sequences_that_are_left() -> None:
    parties = Parties(build({"train.epochs": 2, "train.samples": 7}), Workload(sequences=50, held_out=10))
    assert step_sizes(parties) == [4, 3, 4, 3]
    assert evaluation_sizes(parties) == [4, 4, 2] and [*sampled_batches(parties).values()] == [4, 4]
