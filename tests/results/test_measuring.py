"""A finished run, measured: equal to what the run reported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_formats import PLAIN
from transformers import AutoModelForSequenceClassification

from fedsplit import scores
from fedsplit.corpora.synthetic import TOPICS
from fedsplit.errors import SettingError
from fedsplit.model.unsplit import load_unsplit
from fedsplit.results import measuring
from fedsplit.results.finished import open_run
from fedsplit.scores import Score


def pooled(results: list[measuring.Result]) -> Score:
    return scores.pooled(result.tuned for result in results)


def reported(run: Path) -> tuple[dict[str, float], dict[str, float]]:
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clients = [event for event in events if event["event"] == "evaluate"][-1]["clients"]
    return json.loads((run / "summary.json").read_text())["eval_loss"], clients


@pytest.mark.parametrize(("model", "strategy"), [("gpt2", "fedavg"), ("llama", "fedavg"), ("gpt2", "fedex")])
def test_losses_are_those_that_the_run_reported(model: str, strategy: str, finished_run: Callable[..., Path]) -> None:
    run = finished_run(model, strategy)
    results, (loss, clients) = measuring.evaluate(open_run(run)), reported(run)
    assert pooled(results).loss == pytest.approx(loss["after"], abs=1e-5)
    assert scores.pooled(r.base for r in results).loss == pytest.approx(loss["before"], abs=1e-5)
    assert {result.name: result.tuned.loss for result in results} == pytest.approx(clients, abs=1e-5)
    opened = PeftModel.from_pretrained(load_unsplit(open_run(run).config.model_path), str(run / "adapter"))
    assert measuring.held_out_loss(opened, run) == pytest.approx(loss["after"], abs=1e-5)
    assert measuring.held_out_loss(opened, run, [1]) == pytest.approx(clients["bob"], abs=1e-5)


@pytest.mark.parametrize("format", ["completion", "chat"])
def test_of_other_formats_too(
    format: str, finished_run: Callable[..., Path], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """Prompts are not counted, lengths differ, and losses are pooled by what is predicted."""
    model = tmp_path / "model"
    shutil.copytree(tiny_models["gpt2"], model)
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": PLAIN}
    (model / "tokenizer_config.json").write_text(json.dumps(facts))
    rows = []
    for n in range(24):
        prompt, completion = f"{n}+{n}", f"{n + n}" * (1 + n % 3)
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        rows.append({"prompt": prompt, "completion": completion, "messages": turns, "owner": "abc"[n % 3]})
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"dataset": str(tmp_path / "sums.jsonl"), "data__format": format}
    run = finished_run(str(model), **data, train__max_length=32, eval__samples=6)
    results, (loss, clients) = measuring.evaluate(open_run(run)), reported(run)
    assert pooled(results).loss == pytest.approx(loss["after"], abs=1e-5)
    assert {result.name: result.tuned.loss for result in results} == pytest.approx(clients, abs=1e-5)
    said = [len(row["completion"]) + 1 for row in rows]  # with the end token, or the end of a turn
    held_out = [said[9 + owner] + said[21 + owner] for owner in range(3)]
    assert [result.tuned.tokens for result in results] == held_out


@pytest.mark.parametrize("strategy", ["fedavg", "fedsa"])
def test_classes_are_told_as_the_run_reported(strategy: str, finished_run: Callable[..., Path], tmp_path: Path) -> None:
    """The head is in the adapter: PEFT opens it on the library's classifier, with the same loss and accuracy."""
    settings = {"dataset": "synthetic", "data__format": "classification", "train__max_length": 32}
    run = finished_run("gpt2", strategy, **settings)
    results, (loss, clients) = measuring.evaluate(open_run(run)), reported(run)
    assert pooled(results).loss == pytest.approx(loss["after"], abs=1e-5)
    assert scores.pooled(r.base for r in results).loss == pytest.approx(loss["before"], abs=1e-5)
    assert {result.name: result.tuned.loss for result in results} == pytest.approx(clients, abs=1e-5)
    accuracy = json.loads((run / "summary.json").read_text())["accuracy"]
    assert pooled(results).accuracy == pytest.approx(accuracy["after"])
    assert loss["after"] < loss["before"]
    if strategy == "fedavg":
        base = AutoModelForSequenceClassification.from_pretrained(open_run(run).config.model_path, num_labels=4)
        opened = PeftModel.from_pretrained(base, str(run / "adapter"))
        assert measuring.held_out_loss(opened, run) == pytest.approx(loss["after"], abs=1e-5)
        other = tmp_path / "other.jsonl"  # its classes are numbered as the run's, though it has one of them only
        other.write_text('{"text": "abcd", "label": "market"}\n')
        (found,) = measuring.evaluate(open_run(run), str(other))
        ids, market = torch.tensor([[ord(c) - 32 for c in "abcd"]]), torch.tensor([sorted(TOPICS).index("market")])
        assert found.tuned.loss == pytest.approx(float(opened(input_ids=ids, labels=market).loss), abs=1e-5)
        assert torch.equal(
            load_file(run / "adapter" / "adapter_model.safetensors")["base_model.model.score.weight"],
            load_file(run / "top_lora" / "adapter_model.safetensors")["base_model.model.score.weight"],
        )


def test_classes_are_told_with_any_kind_of_adapter(finished_run: Callable[..., Path]) -> None:
    """Of some, PEFT leaves the head wrapped when it takes them off."""
    settings = {"dataset": "synthetic", "data__format": "classification", "train__max_length": 32}
    run = finished_run("gpt2", lora__method="ln_tuning", lora__rank=8, lora__alpha=16, lora__dropout=0.1, **settings)
    results, (loss, _) = measuring.evaluate(open_run(run)), reported(run)
    assert pooled(results).loss == pytest.approx(loss["after"], abs=1e-5)


def test_every_client_with_its_own_adapter(finished_run: Callable[..., Path]) -> None:
    run = finished_run("gpt2", "fedsa")
    results, (loss, clients) = measuring.evaluate(open_run(run)), reported(run)
    assert pooled(results).loss == pytest.approx(loss["after"], abs=1e-5)
    assert {result.name: result.tuned.loss for result in results} == pytest.approx(clients, abs=1e-5)
    (alone,) = measuring.evaluate(open_run(run), client=2)
    assert alone.name == "cid" and alone == results[2]


@pytest.mark.parametrize(("dtype", "distance"), [("bf16", 0.02), ("fp16", 0.002)])
def test_a_run_in_16_bits_is_close(dtype: str, distance: float, finished_run: Callable[..., Path]) -> None:
    """What the split rounds where parts meet, the unsplit model does not."""
    run = finished_run("gpt2", dtype=dtype)
    assert pooled(measuring.evaluate(open_run(run))).loss == pytest.approx(reported(run)[0]["after"], rel=distance)


def test_other_text_is_measured_whole_and_by_owner(finished_run: Callable[..., Path], tmp_path: Path) -> None:
    """Accuracy and loss against the library's own."""
    run = open_run(finished_run("gpt2"))
    rows = [{"text": "abcdefgh" * 10, "owner": "dan"}, {"text": "hello " * 20, "owner": "eve"}]
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dan, eve = measuring.evaluate(run, str(tmp_path / "other.jsonl"))
    assert (dan.name, eve.name) == ("dan", "eve")
    assert (dan.tuned.tokens, eve.tuned.tokens) == (5 * 15, 7 * 15)
    ids = torch.tensor([[ord(c) - 32 for c in "abcdefgh" * 10]]).reshape(5, 16)
    model = PeftModel.from_pretrained(load_unsplit(run.config.model_path), str(run.path / "adapter")).eval()
    found = model(input_ids=ids, labels=ids)
    assert dan.tuned.loss == pytest.approx(float(found.loss), abs=1e-5)
    right = found.logits[:, :-1].argmax(-1) == ids[:, 1:]
    assert dan.tuned.accuracy == pytest.approx(float(right.float().mean()))
    assert [r.tuned.tokens for r in measuring.evaluate(run, str(tmp_path / "other.jsonl"), samples=2)] == [30, 30]


def test_what_is_measured_is_told(finished_run: Callable[..., Path]) -> None:
    """Three clients' text, with the base model and with the adapter."""
    told: list[tuple[str, int, int]] = []
    measuring.evaluate(open_run(finished_run("gpt2", "fedavg")), tell=lambda *now: told.append(now))
    assert [(done, of) for _, done, of in told] == [(number, 6) for number in range(6)]
    assert told[0][0].startswith("base model, text of ") and told[-1][0].startswith("with the adapter, text of ")


def test_the_text_of_a_run_of_sites_is_not_taken_from_the_data_set_that_the_server_would_have(
    finished_run: Callable[..., Path], tmp_path: Path
) -> None:
    """Its settings name the default data set, which no client has seen."""
    run = tmp_path / "run"
    shutil.copytree(finished_run("llama", "fedavg"), run)
    settings = (run / "config.toml").read_text()
    assert 'at = "driver"' in settings
    (run / "config.toml").write_text(settings.replace('at = "driver"', 'at = "site"'))
    with pytest.raises(SettingError, match="held-out text is at its sites"):
        measuring.evaluate(open_run(run))
    with pytest.raises(SettingError, match="held-out text is at its sites"):
        measuring.held_out_loss(torch.nn.Linear(1, 1), run)
    assert measuring.evaluate(open_run(run), dataset="synthetic")
