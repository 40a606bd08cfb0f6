"""Tables about adapters; tests/commands/test_adapters.py has the command that prints them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fedsplit.commands.adapter_tables import MODEL_MISSING, compare, summary
from fedsplit.results.finished import open_run


def test_a_summary_has_a_line_for_every_part_and_for_every_client_with_an_adapter(
    finished_run: Callable[..., Path],
) -> None:
    facts, head, *rows = summary(open_run(finished_run("gpt2", "fedsa")))
    assert facts.startswith("model ") and "strategy fedsa; ranks 2" in facts
    assert head.split() == ["trainable", "frozen", "total", "in", "the", "file", "file"]
    assert [row.split()[0] for row in rows] == ["bottom", "trunk", "top", "whole", "client", "client", "client"]
    totals = [int(row.split()[3].replace(",", "")) for row in rows[:4]]
    assert sum(totals[:3]) == totals[3]


def test_a_summary_says_that_the_model_is_elsewhere(finished_run: Callable[..., Path]) -> None:
    run = open_run(finished_run("gpt2"))
    moved = replace(run, config=replace(run.config, model="nowhere"))
    assert summary(moved)[-1] == MODEL_MISSING


def test_a_run_beside_itself_differs_in_nothing(finished_run: Callable[..., Path]) -> None:
    run = open_run(finished_run("gpt2"))
    lines = compare(run, run)
    assert not any(line.startswith(("seed", "clients", "train.")) for line in lines)
    assert [line.split()[-2:] for line in lines if line.startswith("all")] == [["0.0000", "1.0000"]]
