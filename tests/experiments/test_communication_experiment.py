"""The experiment on what is trained, sent and held: its tables, and what its result says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments.communication import measure, report

EXPERIMENT = Path("experiments/communication")


def records() -> dict[tuple[Any, ...], dict[str, Any]]:
    result = json.loads((EXPERIMENT / "result.json").read_text())
    return {measure._key(record): record for record in result["records"]}


def test_the_tables_are_the_results() -> None:
    result = json.loads((EXPERIMENT / "result.json").read_text())
    assert report.text(result) in (EXPERIMENT / "README.md").read_text()


def test_the_parties_together_train_what_the_whole_trains() -> None:
    found = records()
    for key, whole in found.items():
        if key[-1] == "whole" and key[1] == "lora":
            parties = [found[*key[:-1], party] for party in ("client", "trunk") if (*key[:-1], party) in found]
            if len(parties) < 2:  # not measured yet
                continue
            assert sum(party["trainable"] for party in parties) == whole["trainable"]


def test_gradients_and_moments_are_of_the_trained_parameters() -> None:
    for key, record in records().items():
        if key[-1] != "run":
            assert record["moments"] == 2 * record["gradients"] == 8 * record["trainable"]


def test_a_step_sends_the_same_whatever_is_trained() -> None:
    for model in ("GPT-2 small", "SmolLM2-135M"):
        runs = [record for key, record in records().items() if key[0] == model and key[-1] == "run"]
        assert len({run["bytes"]["activation_up"] for run in runs}) == 1
