"""Whole federations with an objective and metrics of the user's own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from local_federation import federate

from fedsplit.settings.config import Config
from fedsplit.settings.documents import build
from strategies.fedavg import FedAvg

MINE = """
def halves(logits, labels):
    return float(len(labels)) / 2, len(labels)

def breaks(logits, labels):
    raise ValueError("no references")

def at_step_two(logits, labels):
    at_step_two.calls = getattr(at_step_two, "calls", 0) + 1
    return logits.mean() * 0 - 1 if at_step_two.calls > 1 else logits.mean().square()
"""


@pytest.fixture
def config(tiny_models: dict[str, Path], corpus_file: Path) -> Config:
    values = {"model": str(tiny_models["gpt2"]), "clients": 3, "rounds": 2, "cut": "1:2", "dataset": str(corpus_file)}
    values |= {"partition": "natural", "lora.rank": 2, "train.steps": 2, "train.batch_size": 2, "train.lr": 0.02}
    return build(values | {"train.max_length": 16, "trunk.schedule": "copies"})


def evaluations(out: Path) -> list[dict]:
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "evaluate"]


def training_losses(out: Path) -> list[float]:
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [event["loss"] for event in events if event["event"] == "train"]


def test_metrics_are_reported_round_by_round_and_a_run_goes_on_with_them(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    config = replace(config, metric=(f"{tmp_path}/mine.py:halves", "token_accuracy"))
    _, lines = federate(config, tmp_path / "straight", FedAvg(), monkeypatch)
    federate(replace(config, rounds=1), tmp_path / "stopped", FedAvg(), monkeypatch)
    federate(replace(config, resume=str(tmp_path / "stopped")), tmp_path / "stopped", FedAvg(), monkeypatch)

    straight, stopped = evaluations(tmp_path / "straight"), evaluations(tmp_path / "stopped")
    assert [event["metrics"] for event in straight] == [event["metrics"] for event in stopped]
    assert [event["client_metrics"] for event in straight] == [event["client_metrics"] for event in stopped]
    for event in straight:
        of_clients = event["client_metrics"]["token_accuracy"]
        assert of_clients.keys() == event["clients"].keys() and all(0 <= value <= 1 for value in of_clients.values())
        assert min(of_clients.values()) <= event["metrics"]["token_accuracy"] <= max(of_clients.values())
        assert event["metrics"]["halves"] == 0.5
    ends = {"before": straight[0]["metrics"]["token_accuracy"], "after": straight[-1]["metrics"]["token_accuracy"]}
    for name in ("straight", "stopped"):
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["metrics"] == {"token_accuracy": ends, "halves": {"before": 0.5, "after": 0.5}}
    assert [" halves 0.5" in line for line in lines.lines if line.startswith("round ")] == [True] * 3, lines.lines


def test_the_best_rounds_metrics_are_reported_with_its_adapter(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The strategy undoes what the first round has learned, so that the first round is the best, and not the last."""

    class Undoes(FedAvg):
        rounds = 0

        def aggregate(self, state, adapters, updates):
            state, found = super().aggregate(state, adapters, updates)
            self.rounds += 1
            scale = 1 if self.rounds == 1 else 0
            return state, found.with_tensors({name: tensor * scale for name, tensor in found.tensors.items()})

    train = replace(config.train, lr=0.1)
    config = replace(config, metric=("token_accuracy",), keep_best=True, rounds=3, train=train)
    federate(config, tmp_path, Undoes(), monkeypatch)
    summary = json.loads((tmp_path / "summary.json").read_text())
    best = summary["adapter_round"]
    assert best != summary["last_round"]
    by_round = {event["round"]: event["metrics"]["token_accuracy"] for event in evaluations(tmp_path)}
    assert summary["metrics"]["token_accuracy"]["after"] == by_round[best] != by_round[3]


def test_an_objective_changes_training_and_its_loss_but_not_how_held_out_text_is_measured(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smooth = replace(config, objective="label_smoothing", objective_options={"smoothing": 0.5})
    for name, how in (("plain", config), ("smooth", smooth)):
        federate(replace(how, rounds=1), tmp_path / name, FedAvg(), monkeypatch)
    plain, smoothed = (evaluations(tmp_path / name) for name in ("plain", "smooth"))
    assert plain[0]["loss"] == smoothed[0]["loss"]
    assert plain[1]["loss"] != smoothed[1]["loss"]
    assert training_losses(tmp_path / "smooth")[0] > training_losses(tmp_path / "plain")[0] + 0.01


@pytest.mark.parametrize(
    ("setting", "name", "message"),
    [
        (
            "metric",
            "breaks",
            r"the metric .*mine.py:breaks failed: ValueError: no references \(mine.py",
        ),
        (
            "objective",
            "at_step_two",
            r"the objective .*at_step_two returned -1, not a number",
        ),
    ],
)
def test_measures_that_break_later_are_named(
    config: Config, setting: str, name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    spec = f"{tmp_path}/mine.py:{name}"
    broken = replace(config, **{setting: (spec,) if setting == "metric" else spec})
    with pytest.raises(Exception, match=message):
        federate(broken, tmp_path / "run", FedAvg(), monkeypatch)


def test_routers_are_balanced_beside_the_base_model_as_without_it(
    config: Config, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base model's routers are not heard: the auxiliary loss is that of the tuned model's alone."""
    experts = replace(config, model=str(tiny_models["mixtral"]), router_aux_loss=0.1, rounds=1)
    alone = replace(experts, objective="distillation", objective_options={"alpha": 0.0})
    for name, how in (("plain", experts), ("compared", alone)):
        federate(how, tmp_path / name, FedAvg(), monkeypatch)
    plain, compared = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("plain", "compared")
    )
    balances = [[e["router_aux_loss"] for e in events if e["event"] == "train"] for events in (plain, compared)]
    assert balances[1] == pytest.approx(balances[0], rel=1e-4) and balances[0][0] > 0
    assert training_losses(tmp_path / "compared") == pytest.approx(training_losses(tmp_path / "plain"), rel=1e-4)
    assert evaluations(tmp_path / "compared")[-1]["bytes"]["reference_up"] > 0


@pytest.mark.parametrize("trunk", [{"replicas": 2}, {"stages": "0:1:2"}], ids=str)
def test_replicas_and_stages_have_the_base_model_too(
    config: Config, trunk: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = replace(config, objective="distillation", cut="0:2")
    for name, how in (("whole", {}), ("divided", trunk)):
        federate(replace(compared, trunk=replace(config.trunk, **how)), tmp_path / name, FedAvg(), monkeypatch)
    whole, divided = (evaluations(tmp_path / name)[-1] for name in ("whole", "divided"))
    assert divided["loss"] == whole["loss"]
    assert divided["bytes"]["reference_up"] == whole["bytes"]["reference_up"] > 0
    assert training_losses(tmp_path / "divided") == training_losses(tmp_path / "whole")
