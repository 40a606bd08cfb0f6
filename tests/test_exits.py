"""What leaves a run opens elsewhere: for every family, in plain transformers and PEFT, with the loss that was reported.

Nothing here that opens or measures is fedsplit's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_command
from conftest import CONFIGS, write_corpus
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedsplit.commands import simulate

LENGTH, CLIENTS = 16, 2

END = 0
"""The token that ends a text, of all tiny models."""

ON_RAY = ("gemma3_text", "mixtral")
"""Families that go through Ray and Flower's engine, too: two tables of rotations, and what routers sum, cross there."""


def asked(model: Path, corpus: Path, out: Path) -> list[str]:
    """The command line of a run."""
    settings = {"--model": model, "--dataset": corpus, "--out": out, "--clients": CLIENTS, "--cut": "1:2"}
    settings |= {"--partition": "natural", "--rounds": 1, "--train.steps": 2, "--batch-size": 2, "--lr": 0.05}
    settings |= {"--max-length": LENGTH, "--lora-rank": 2, "--workers": 1, "--threads": 1}
    return [str(word) for pair in settings.items() for word in pair]


def held_out(model: Path, corpus: Path) -> torch.Tensor:
    """Every fourth text of the first owners, a stream for each, in blocks."""
    tokenizer = AutoTokenizer.from_pretrained(model)  # for some families it differs from the bare tokenizer.json
    texts: dict[str, list[str]] = {}
    for row in map(json.loads, corpus.read_text().splitlines()):
        texts.setdefault(row["owner"], []).append(row["text"].strip())
    blocks = []
    for own in list(texts.values())[:CLIENTS]:
        stream = [token for text in own[3::4] for token in (*tokenizer.encode(text, add_special_tokens=False), END)]
        blocks += [stream[begin : begin + LENGTH] for begin in range(0, len(stream) - LENGTH + 1, LENGTH)]
    return torch.tensor(blocks)


@torch.no_grad()
def loss_of(model: Any, blocks: torch.Tensor) -> float:
    """Nats a token; the first of a block is not predicted."""
    logits = model.eval()(input_ids=blocks).logits[:, :-1].flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(logits, blocks[:, 1:].flatten()))


def check(model: Path, corpus: Path, out: Path) -> None:
    """The base alone has the loss before, and with the adapter the loss after."""
    reported = json.loads((out / "summary.json").read_text())["eval_loss"]
    blocks = held_out(model, corpus)
    assert PeftConfig.from_pretrained(str(out / "adapter")).base_model_name_or_path == str(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    assert loss_of(base, blocks) == pytest.approx(reported["before"], abs=1e-5)
    assert loss_of(PeftModel.from_pretrained(base, str(out / "adapter")), blocks) == pytest.approx(
        reported["after"], abs=1e-5
    )
    assert abs(reported["after"] - reported["before"]) > 1e-3


@pytest.mark.slow
@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize("family", list(CONFIGS))
def test_the_adapter_of_every_family_opens_with_the_loss_that_the_command_reports(
    family: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    assert simulate.main(asked(tiny_models[family], corpus, tmp_path / "run")) == 0
    check(tiny_models[family], corpus, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("family", ON_RAY)
def test_and_as_a_user_types_it(family: str, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    done = warm_command.command(
        "fedsplit.simulate", *asked(tiny_models[family], corpus, tmp_path / "run"), cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    check(tiny_models[family], corpus, tmp_path / "run")
