"""Whole federations on pairs of texts, of which one is preferred; through the command, too."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import warm_command
from local_federation import federate
from peft import PeftModel
from safetensors.torch import load_file

from fedsplit import scores
from fedsplit.commands import evaluate, simulate
from fedsplit.corpora.partition import partition_of
from fedsplit.errors import InputError
from fedsplit.federation.workload import workloads
from fedsplit.model.unsplit import load_unsplit
from fedsplit.results import measuring
from fedsplit.results.finished import open_run
from fedsplit.settings.config import Config
from fedsplit.settings.documents import build
from strategies.fedavg import FedAvg

NAMES = {"preference_accuracy", "preference_margin"}


def write_pairs(path: Path) -> Path:
    """Pairs of two owners, of different lengths."""
    rows = []
    for owner in ("ann", "bob"):
        for number in range(9):
            pair = {"chosen": "yes" * (1 + number % 3), "rejected": "no" * (1 + number % 2)}
            rows.append({"prompt": f"{owner}{number}:", "owner": owner, **pair})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def config(tiny_models: dict[str, Path], tmp_path: Path) -> Config:
    values: dict[str, object] = {"model": str(tiny_models["llama"]), "clients": 2, "rounds": 2, "cut": "1:2"}
    values |= {"dataset": str(write_pairs(tmp_path / "pairs.jsonl")), "partition": "natural", "objective": "dpo"}
    values |= {"data.format": "preference", "lora.rank": 2, "lora.dropout": 0.0, "train.lr": 0.02}
    values |= {"train.steps": 3, "train.max_length": 16, "trunk.schedule": "copies", "kernels": "library"}
    return build(values, None, {"beta": 0.3})


def events(out: Path, name: str) -> list[dict]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def test_preferences_are_learned_and_reported_round_by_round(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And measured again on the unsplit model, where the adapter is taken off for the reference."""
    out = tmp_path / "run"
    _, lines = federate(config, out, FedAvg(), monkeypatch)
    before, *_, after = events(out, "evaluate")
    assert before["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert before["metrics"]["preference_margin"] == pytest.approx(0, abs=1e-5)
    assert after["loss"] < 0.65 and after["metrics"]["preference_accuracy"] > 0.6
    assert after["tokens"] == sum(len(shard.held_out) // 2 for shard in partition_of(config).shards)
    assert "perplexity" not in after and "accuracy" not in after
    summary = json.loads((out / "summary.json").read_text())
    assert summary["metrics"].keys() == NAMES
    assert summary["bytes"]["reference_up"] > summary["bytes"]["activation_up"]
    shown = [line for line in lines.lines if line.startswith("round ")]
    assert len(shown) == 3 and all(" preference_accuracy " in line and "perplexity" not in line for line in shown)

    run = open_run(out)
    results = measuring.evaluate(run, metrics=evaluate.metrics_of(run.config, [], {})[0])
    for side, event in (("base", before), ("tuned", after)):
        total = scores.pooled(getattr(result, side) for result in results)
        assert total.loss == pytest.approx(event["loss"], abs=1e-5)
        for name, mean in scores.means(total.metrics).items():
            if name in event["metrics"] and side == "tuned":
                assert mean == pytest.approx(event["metrics"][name], abs=1e-4), name
    opened = PeftModel.from_pretrained(load_unsplit(run.config.model_path), str(out / "adapter"))
    assert measuring.held_out_loss(opened, out) == pytest.approx(after["loss"], abs=1e-5)
    with pytest.raises(InputError, match="a model of PEFT's with the adapter attached"):
        measuring.held_out_loss(load_unsplit(run.config.model_path), out)


def test_a_run_on_pairs_goes_on_where_it_stopped(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federate(config, tmp_path / "straight", FedAvg(), monkeypatch)
    federate(replace(config, rounds=1), tmp_path / "stopped", FedAvg(), monkeypatch)
    federate(replace(config, resume=str(tmp_path / "stopped")), tmp_path / "stopped", FedAvg(), monkeypatch)
    straight, stopped = (
        [(event["loss"], event["metrics"]) for event in events(tmp_path / name, "evaluate")]
        for name in ("straight", "stopped")
    )
    assert straight == stopped and len(straight) == 3


@pytest.mark.slow
def test_a_stopped_command_on_pairs_goes_on(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """The folder names the format, although the call left it to the columns."""
    pairs, out = write_pairs(tmp_path / "pairs.jsonl"), str(tmp_path / "run")
    assert simulate.main(argv(tiny_models["llama"], pairs, "--out", out)) == 0
    assert simulate.main(["--resume", out, "--rounds", "2"]) == 0
    assert [event["round"] for event in events(tmp_path / "run", "evaluate")] == [0, 1, 2]


@pytest.mark.parametrize(
    "settings", [{"train.epochs": 2}, {"train.samples": 4}, {"train.accumulation": 2, "eval.samples": 2}], ids=str
)
def test_clients_count_what_the_server_expects(
    config: Config, settings: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the server would refuse their replies. Sequences are counted in training, pairs in evaluations."""
    for name, value in settings.items():
        section, _, field = name.partition(".")
        config = replace(config, **{section: replace(getattr(config, section), **{field: value})})
    config = replace(config, rounds=1)
    _, lines = federate(config, tmp_path / "run", FedAvg(), monkeypatch)
    assert not [line for line in lines.lines if "left out" in line]
    shards = partition_of(config).shards
    assert all(len(shard.train) % 2 == 0 for shard in shards)
    assert events(tmp_path / "run", "evaluate")[-1]["tokens"] == sum(
        work.held_out for work in workloads(config, [shard.size for shard in shards])
    )


def test_micro_batches_and_accumulation_are_a_large_batch(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pairs weigh the same, however many tokens they have."""
    found = []
    config = replace(config, rounds=1)
    sgd = replace(config.train, optimizer="sgd", lr=0.1, batch_size=8)
    for train in (sgd, replace(sgd, micro_batches=4), replace(sgd, batch_size=4, accumulation=2, micro_batches=2)):
        out = tmp_path / f"{train.batch_size}-{train.micro_batches}"
        federate(replace(config, train=train), out, FedAvg(), monkeypatch)
        found.append((load_file(out / "adapter" / "adapter_model.safetensors"), events(out, "train")[-1]["loss"]))
    (large, loss), *others = found
    for small, other_loss in others:
        assert other_loss == pytest.approx(loss, rel=1e-5)
        for name, tensor in large.items():
            assert torch.allclose(tensor, small[name], atol=2e-6), name


def test_an_objective_over_pairs_of_the_users_needs_no_reference(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The likelihood ratio alone, as in CPO without its second term. In training nothing more crosses."""
    (tmp_path / "mine.py").write_text(
        "from torch.nn import functional\n"
        "from fedsplit.objectives.log_ratios import log_likelihoods\n"
        "def ratio(logits, labels):\n"
        "    chosen, rejected = log_likelihoods(logits, labels).view(-1, 2).T\n"
        "    return -functional.logsigmoid(0.1 * (chosen - rejected)).mean()\n"
        "ratio.mean_over = 'pairs'\n"
    )
    mine = replace(config, objective=f"{tmp_path}/mine.py:ratio", objective_options={}, rounds=1)
    federate(mine, tmp_path / "run", FedAvg(), monkeypatch)
    sent = events(tmp_path / "run", "evaluate")
    assert sent[-1]["metrics"].keys() == NAMES
    measured_before = sent[0]["bytes"]["reference_up"]
    assert sent[-1]["bytes"]["reference_up"] == measured_before  # the sample after training has no metrics


def argv(model: Path, dataset: Path, *more: str) -> list[str]:
    return [
        *("--model", str(model), "--dataset", str(dataset), "--objective", "dpo", "--objective.beta", "0.3"),
        *("--clients", "2", "--rounds", "1", "--cut", "1:2", "--train.steps", "2", "--max-length", "16"),
        *("--lora-rank", "2", "--partition", "natural", "--engine", "local", *more),
    ]


@pytest.mark.slow
def test_the_command_finds_pairs_by_their_columns(
    tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    call = argv(tiny_models["llama"], pairs, "--out", str(tmp_path / "run"))
    assert simulate.main(call) == 0
    assert "data: preference" in capsys.readouterr().out
    assert open_run(tmp_path / "run").config.data.format == "preference"
    assert evaluate.main(["--run", str(tmp_path / "run")]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["pairs", "loss", "preference_accuracy", "preference_margin"]
    assert [row.split()[0] for row in rows] == ["ann", "bob", "all"]
    assert evaluate.main(["--run", str(tmp_path / "run"), "--dataset", str(pairs)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:2] == ["all", "18"]
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "words " * 9}))
    assert evaluate.main(["--run", str(tmp_path / "run"), "--dataset", str(text), "--data.format", "text"]) == 0
    head = capsys.readouterr().out.splitlines()[0]
    assert "perplexity" in head and "preference" not in head
    text_alone = ["--dataset", str(text), "--data.format", "text", "--metric", "preference_margin"]
    assert evaluate.main(["--run", str(tmp_path / "run"), *text_alone]) == 2
    assert "metric: preference_margin is not possible; allowed: one that compares no pairs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--train.batch-size", "3"], "train.batch_size: 3 is not possible; allowed: an even number"),
        (["--data.packing", "true"], "data.packing: true is not possible; allowed: auto | false"),
        (
            ["--strategy", "flora"],
            "objective: dpo is not possible; allowed: an objective that does not ask for the ref",
        ),
        (["--objective", "distillation"], "objective: distillation is not possible; allowed: dpo, or an objective"),
        (
            ["--dataset", "synthetic"],
            "objective: dpo is not possible; allowed: one that compares no pairs, for data of",
        ),
        (["--data.rejected", "worse"], "dataset: "),
    ],
)
def test_what_does_not_go_with_pairs_is_refused_in_one_line(
    more: list[str], message: str, tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = argv(tiny_models["llama"], write_pairs(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "run"), *more)
    if "distillation" in more:
        call.remove("--objective.beta"), call.remove("0.3")
    assert simulate.main(call) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "run").exists()


def test_pairs_are_measured_after_a_run_on_pairs_alone(
    tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs, out = write_pairs(tmp_path / "pairs.jsonl"), str(tmp_path / "run")
    plain = ["--objective", "cross_entropy", "--data.format", "completion", "--data.completion", "chosen", "--out", out]
    call = argv(tiny_models["llama"], pairs, *plain)
    call.remove("--objective.beta"), call.remove("0.3")
    assert simulate.main(call) == 0
    for more in (["--data.format", "auto"], ["--data.format", "preference"]):
        assert evaluate.main(["--run", out, "--dataset", str(pairs), *more]) == 2
        assert "pairs" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--trunk.schedule", "copies"], ["--deterministic", "--trunk.group", "1"]], ids=str)
def test_both_engines_leave_the_same_adapters_to_the_bit(
    flags: list[str], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    pairs, left, losses = write_pairs(tmp_path / "pairs.jsonl"), [], []
    for engine in ("local", "ray"):
        out = tmp_path / engine
        call = [*argv(tiny_models["llama"], pairs), *flags, "--engine", engine, "--out", str(out)]
        done = warm_command.command("fedsplit.simulate", *call, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        left.append(load_file(out / "adapter" / "adapter_model.safetensors"))
        losses.append([(event["loss"], event["metrics"]) for event in events(out, "evaluate")])
    assert losses[0] == losses[1]
    assert all(torch.equal(tensor, left[1][name]) for name, tensor in left[0].items())
