"""Folders of runs as they are read: with whatever their files hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from reported_runs import write_run

from fedsplit.reporting.page import html_of
from fedsplit.reporting.run_record import numbers, read_run, shown, text


def test_a_run_that_ended_early_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    document = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**document, "complete": False, "ended": "round 3 was lost once"}))
    assert read_run(run).notes == ("The run ended early: round 3 was lost once",)


@pytest.mark.parametrize("wrong", [None, 3, "x", [1], {"a": {"b": []}}, float("nan"), 10**400])
def test_values_of_a_wrong_kind_are_left_out(wrong: object, tmp_path: Path) -> None:
    """In every place of every file."""
    run = write_run(tmp_path / "run")
    for name in ("summary.json", "data.json"):
        document = json.loads((run / name).read_text())
        (run / name).write_text(json.dumps(dict.fromkeys(document, wrong)))
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = ("event", "round")
    spoilt = [{key: value if key in kept else wrong for key, value in event.items()} for event in events]
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in spoilt))
    assert "<h1>run</h1>" in html_of([read_run(run)])
    assert html_of([read_run(run), read_run(run)])


def test_values_become_text_of_one_line() -> None:
    assert text("a\x1b[31m\nb") == "a [31m b" and text(None) == "" and len(text("x" * 999)) == 60
    assert shown({"mu": 0.1, "on": True}) == "mu=0.1, on=true"
    assert numbers({"a": 1, "b": True, "c": float("inf")}) == {"a": 1.0}
