"""The comparison of a study."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedsplit.settings.config import Config
from fedsplit.studies.comparison_table import MIXED, FailedRun, as_json, comparison, markdown, origin_of
from fedsplit.studies.run_measures import LOSS
from fedsplit.studies.study import label_of
from fedsplit.studies.table import FinishedRun

KINDS = ("activation", "gradient", "adapter")


@pytest.fixture(autouse=True)
def no_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without events of rounds, runs have the measures of their summary alone."""
    (tmp_path / "metrics.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)


def run(point: dict[str, Any], seed: int, loss: float) -> FinishedRun:
    sent = {f"{kind}_{way}": 500_000 for kind in KINDS for way in ("up", "down")}
    summary = {
        "eval_loss": {"after": loss},
        "bytes": sent,
        "tokens": 90,
        "tokens_per_second": 10.0,
    }
    return FinishedRun("", label_of(point), seed, Path(), Config(), summary)


POINTS = [{"strategy": name, "clients": count} for name in ("fedavg", "flora") for count in (2, 4)]


def test_every_point_is_compared_with_the_baseline_of_its_own_other_values() -> None:
    losses = {"fedavg, clients 2": 3.0, "flora, clients 2": 2.0, "fedavg, clients 4": 5.0, "flora, clients 4": 6.0}
    runs = [run(point, seed, losses[label_of(point)] + seed) for point in POINTS for seed in (0, 1)]
    lines = comparison(runs, {label_of(point): point for point in POINTS}, {"strategy": "fedavg"})
    of_loss = {line.label: line for line in lines if line.measure == LOSS}
    assert of_loss["fedavg, clients 2"].test is None and of_loss["fedavg, clients 2"].spread.mean == 3.5
    differences = {label: line.test.difference for label, line in of_loss.items() if line.test}
    assert differences == {"flora, clients 2": -1.0, "flora, clients 4": 1.0}
    assert of_loss["flora, clients 4"].baseline == "fedavg, clients 4"
    costs = {line.measure: line for line in lines if line.label == "flora, clients 2"}
    assert costs["adapter MB up"].spread.mean == 0.5 and costs["adapter MB up"].test is None


def test_missing_runs_leave_what_there_is() -> None:
    runs = [run(POINTS[0], 0, 3.0), run(POINTS[2], 1, 2.0)]
    lines = comparison(runs, {label_of(point): point for point in POINTS}, {"strategy": "fedavg"})
    text = markdown(lines)
    assert "| flora, clients 2 | 1 | 2.0000 | - |" in text and "baseline" not in text
    document = json.loads(as_json(lines, {"seeds": [0, 1]}, {"date": "today"}))
    assert document["study"] == {"seeds": [0, 1]} and document["date"] == "today"
    first = document["comparison"][0]
    assert first["values"] == {"0": 3.0} and first["spread"] == {"mean": 3.0, "deviation": None, "count": 1}


def test_runs_that_failed_are_named_and_their_points_stay() -> None:
    failed = [FailedRun("flora, clients 2", 0, "RuntimeError: no luck")]
    runs = [run(POINTS[0], 0, 3.0)]
    points = {label_of(point): point for point in (POINTS[0], POINTS[2])}
    lines = comparison(runs, points, {"strategy": "fedavg"})
    text = markdown(lines, failed)
    assert "| fedavg, clients 2 | 1 | 3.0000 | - |" in text and "| flora, clients 2 | 0 | - | - |" in text
    assert text.endswith("Runs that failed:\n\n- flora, clients 2, seed 0: RuntimeError: no luck\n")
    (entry,) = json.loads(as_json(lines, {}, {}, failed))["failed"]
    assert entry == {"label": "flora, clients 2", "seed": 0, "reason": "RuntimeError: no luck"}
    nothing = comparison([], points, {})
    assert [(line.measure, line.spread.count) for line in nothing] == [(LOSS, 0)] * 2


def test_the_origin_is_that_of_the_runs() -> None:
    first, second = (run(POINTS[0], seed, 3.0) for seed in (0, 1))
    origins = [{"git": {"commit": commit}, "versions": {"torch": "2"}, "date": commit} for commit in "ab"]
    runs = [
        replace(each, summary={**each.summary, **origin}) for each, origin in zip((first, second), origins, strict=True)
    ]
    origin = origin_of(runs)
    assert origin["git"] == MIXED and origin["versions"] == {"torch": "2"}
    assert [each["git"]["commit"] for each in origin["runs"]] == ["a", "b"]
    assert origin_of(runs[:1])["git"] == {"commit": "a"}
