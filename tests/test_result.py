"""What a finished run left, for Python."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fedsplit
from fedsplit.results.measuring import held_out_loss


@pytest.fixture
def result(finished_run: Callable[..., Path]) -> fedsplit.Result:
    return fedsplit.open(finished_run("gpt2"))


def test_losses_are_those_of_the_events(result: fedsplit.Result) -> None:
    losses = result.losses
    events = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    for name, split in (("train", "train"), ("evaluate", "held_out")):
        for event in (event for event in events if event["event"] == name):
            rows = losses[(losses["round"] == event["round"]) & (losses.split == split)].set_index("client")
            assert rows.loc["all", "loss"] == event["loss"] and rows.loc["all", "tokens"] == event["tokens"]
            assert dict(rows.loss.drop("all")) == event["clients"]
            assert rows.loc["all", "perplexity"] == math.exp(event["loss"])
    assert len(losses) == (3 + 1) * (3 + 2)  # clients and all, evaluated three times and trained twice
    assert set(losses.split) == {"train", "held_out"}


def test_a_client_whose_name_is_all_is_not_taken_for_all(result: fedsplit.Result) -> None:
    event = {"event": "train", "round": 1, "loss": 2.0, "clients": {"all": 1.0, "bob": 3.0}, "tokens": 8, "elapsed": 1}
    assert [(row["client"], row["loss"]) for row in result._rows_of(event)] == [
        ("all", 2.0),
        ("all (client)", 1.0),
        ("bob", 3.0),
    ]


def test_the_loss_with_a_term_for_routers_is_no_perplexity(result: fedsplit.Result) -> None:
    event = {"event": "train", "round": 1, "loss": 2.0, "clients": {}, "tokens": 8, "elapsed": 1}
    (plain,) = result._rows_of(event)
    (routed,) = result._rows_of({**event, "router_aux_loss": 0.5})
    assert (plain["perplexity"], routed["perplexity"]) == (math.exp(2.0), None)


def test_the_model_is_that_of_the_summary(result: fedsplit.Result) -> None:
    model = result.model()
    assert type(model).__name__ == "PeftModelForCausalLM" and not model.training
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert held_out_loss(model, result.folder) == pytest.approx(result.summary["eval_loss"]["after"], abs=1e-5)
    ids = torch.tensor([result.tokenizer()("ann wrote")["input_ids"]])
    assert model(input_ids=ids).logits.shape[:2] == ids.shape


def test_the_model_of_a_client_is_its_own(finished_run: Callable[..., Path]) -> None:
    result = fedsplit.open(finished_run("gpt2", share="bottom,trunk"))
    one, two = (dict(result.model(client).named_parameters()) for client in (0, 1))
    assert any(not torch.equal(one[name], two[name]) for name in one if "lora" in name)
    with pytest.raises(fedsplit.InputError, match="client: 7 is not possible"):
        result.model(7)


def test_the_plot_has_a_line_for_each_client_and_split(result: fedsplit.Result, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = result.plot()
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.get_lines() if line.get_marker() == "o"] == ["held-out", "train"]
    assert len(axes.get_lines()) == 3 + 2
    held_out = axes.get_lines()[3]
    assert list(held_out.get_xdata()) == [0, 1, 2]
    assert held_out.get_ydata()[-1] == result.summary["eval_loss"]["after"]
    figure.savefig(tmp_path / "losses.png")
    assert (tmp_path / "losses.png").stat().st_size


def test_a_result_shows_its_folder_and_losses(result: fedsplit.Result) -> None:
    before, after = (result.summary["eval_loss"][when] for when in ("before", "after"))
    assert repr(result) == f"<Result of {result.folder}: held-out loss {before:.4f} -> {after:.4f}>"
    assert result.config.clients == 3


def test_opening_a_run_loads_no_torch(result: fedsplit.Result) -> None:
    code = f"import sys, fedsplit; fedsplit.open({str(result.folder)!r}).losses; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
