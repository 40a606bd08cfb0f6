"""The card beside an adapter: valid metadata, the run's numbers, and nothing that must stay at home."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from finished_runs import Runs
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM

from fedsplit.evaluate import held_out_loss
from fedsplit.federation.model_card import model_card
from fedsplit.settings.documents import build

SUMMARY: dict[str, Any] = {
    "clients": 2,
    "last_round": 3,
    "eval_clients": 2,
    "eval_loss": {"before": 3.0, "after": 2.0},
    "bytes": {"activation_up": 5000, "evaluation_up": 7},
    "tokens": 1200,
    "wall_seconds": 12.0,
    "host": {"cores": 4},
    "date": "2030-01-02T03:04:05+00:00",
    "versions": {"fedsplit": "0.1.0"},
}


def test_the_metadata_of_a_run_on_the_hubs_model_and_data() -> None:
    values = {"model": "org/name@v1", "dataset": "user/notes", "data.format": "text"}
    card = ModelCard(model_card(build(values), SUMMARY))
    data = card.data.to_dict()
    assert (data["base_model"], data["library_name"], data["datasets"]) == ("org/name", "peft", ["user/notes"])
    assert {"fedsplit", "federated-learning", "split-learning", "lora"} <= set(data["tags"])
    assert data["metrics"] == ["loss", "perplexity"] and data["pipeline_tag"] == "text-generation"
    (result, _) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("loss", 2.0, "notes")
    for words in ("| held-out loss (nats) | 3.0000 | 2.0000 |", "| bytes of training | 5.0 kB |", "12 s on 4 cores"):
        assert words in card.text, words


def test_a_card_says_on_how_little_was_measured_and_gives_no_more_digits() -> None:
    summary = {**SUMMARY, "eval_loss": {"before": 3.0, "after": 2.8344055811564126}}
    card = ModelCard(model_card(build({"eval.samples": 2}), summary))
    assert "Measured by 2 clients on at most 2 sequences each of the text that they held out" in card.text
    assert [result.metric_value for result in card.data.eval_results] == [2.83441, 17.0203]


def test_a_card_names_no_folder_of_the_machine(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "ward 3.jsonl").write_text("")
    values = {"model": str(tmp_path / "model"), "dataset": str(tmp_path / "ward 3.jsonl"), "data.format": "text"}
    text = model_card(build({**values, "strategy": f"{tmp_path}/mine.py:Mine"}), SUMMARY)
    assert str(tmp_path) not in text
    assert "ward 3.jsonl" in text and "mine.py:Mine" in text
    data = ModelCard(text).data.to_dict()
    assert "base_model" not in data and "datasets" not in data


def test_a_classifier_is_opened_as_one_and_has_an_accuracy() -> None:
    summary = {**SUMMARY, "accuracy": {"before": 0.25, "after": 0.75}, "metrics": {"a|b": {"before": None, "after": 1}}}
    text = model_card(build({"data.format": "classification"}), summary)
    assert "AutoPeftModelForSequenceClassification" in text and "| accuracy | 25.00% | 75.00% |" in text
    assert "| a\\|b | - | 1 |" in text
    assert ModelCard(text).data.metrics == ["loss", "accuracy"]


@pytest.fixture(scope="module")
def run(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Runs(tiny_models, tmp_path_factory.mktemp("runs"))("llama")


def test_a_finished_runs_adapter_opens_at_once_from_any_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = AutoPeftModelForCausalLM.from_pretrained(str(run / "adapter"), dtype="float32").eval()
    expected = json.loads((run / "summary.json").read_text())["eval_loss"]["after"]
    assert held_out_loss(model, run) == pytest.approx(expected, abs=1e-5)
    assert ModelCard.load(run / "adapter" / "README.md").data.library_name == "peft"
