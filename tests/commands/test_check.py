"""`fedsplit check`."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsplit.commands.check import main

CODE = """
import torch
from fedsplit.updates import average_adapters, weighted
class Keeps:
    def __init__(self, rate: float = 1.0):
        if rate > 1:
            raise ValueError("rate must not be above 1")
    def init(self, adapters):
        return {}
    def aggregate(self, state, adapters, updates):
        updates, weights = weighted(updates)
        return state, average_adapters(adapters, updates, weights)
class Fails(Keeps):
    def aggregate(self, state, adapters, updates):
        return state, {}
def objective(logits, labels):
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
def metric(logits, labels):
    return float((labels >= 0).sum()), float((labels >= 0).sum())
def needs(logits, labels, attentions):
    return logits.sum()
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(CODE)
    return path


@pytest.mark.parametrize(("name", "kind"), [("Keeps", "strategy"), ("objective", "objective"), ("metric", "metric")])
def test_the_kind_is_found_out(mine: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"{mine}:{name}"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.endswith(f":{name} is {'an' if kind == 'objective' else 'a'} {kind}")
    assert lines and all(line.startswith("ok    ") for line in lines)


def test_what_breaks_a_rule_is_named_once(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"{mine}:Fails"]) == 2
    shown = capsys.readouterr()
    assert shown.out.count("aggregate returned dict, dict, not a state and Adapters") == 1
    assert shown.out.count("\nskip  ") == shown.out.count("(fails as 'rounds')") >= 8
    assert "breaks 1 of the 13 rules for its kind, strategy; " in shown.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["Nothing"], "a class or a function of"),
        (["Keeps", "--strategy.rate", "2"], "strategy.rate: 2 is not possible"),
        (["Keeps", "--strategy.speed", "2"], "strategy.speed: 2 is not possible; allowed: rate"),
        (["needs"], "which asks for attentions"),
        (["Keeps", "--kind", "objective"], "objective:"),
    ],
)
def test_what_is_no_such_code_is_refused(
    mine: Path, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"{mine}:{flags[0]}", *flags[1:]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
