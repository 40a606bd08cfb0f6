"""The trunk experiment: what its report makes of what was measured."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from experiments.speed.report import write_between
from experiments.trunk import memory, report, scale, schedules
from fedsplit.commands.sweep import DEFAULTS
from fedsplit.settings.flags import parse
from fedsplit.studies.study import read_study
from fedsplit.trunk.schedules import SCHEDULES

EXPERIMENT = Path("experiments/trunk")
STUDY = {"host": {"cores": 2}, "versions": {"python": "3"}, "runs": []}
MACHINE = {"cpu": "a", "cores": 2, "memory": 2**30, "date": "today", "commit": "c", "versions": {"python": "3"}}


def measured(schedule: str, losses: list[float], trunk: int = 1) -> dict:
    rounds = [{"round": 0, "held_out": losses[0], "forgotten": {}}]
    for round, loss in enumerate(losses[1:], 1):
        trained = {"tokens": 100, "seconds": 10.0, "loss": loss, "trunk": {"steps": 4}}
        rounds.append({"round": round, "held_out": loss, "forgotten": {"x": 0.1, "y": 0.3}, **trained})
    return {"schedule": schedule, "seed": 0, "trains": {"trunk": trunk}, "rounds": rounds}


def test_time_to_equal_loss_is_to_the_worst_of_those_that_learn() -> None:
    records = [measured("fast", [4, 2, 1]), measured("slow", [4, 3.5, 3]), measured("frozen", [4, 3.9, 3.8], trunk=0)]
    assert report.targets(records) == {0: 3}
    assert report.reached(report.curve(records[0], "seconds"), 3) == 5.0
    assert report.reached(report.curve(records[1], "tokens"), 3) == 200.0
    assert report.reached(report.curve(records[2], "seconds"), 3) is None
    assert report.reached([(0, 2.0), (1, 1.0)], 3) == 0
    text = report.schedules_text({**STUDY, "records": records})
    assert "| fast | 10 | 8 | 1.0000 | 5 | 50 | +0.2000 | +0.2000 |" in text
    assert "| frozen | 10 | 8 | 3.8000 | not reached | not reached |" in text


def case(clients: int, peak: float, kind: str = "crowd", budget: str = "") -> dict:
    steps = [{"seconds": 1.0, "waves": 1, "served": min(clients, 9), "pending": clients, "resident": peak}]
    sizes = {"before": 1e6, "after": peak, "peak": peak, "least": 1e6, "adapter": 1e5, "budget_bytes": 5e6}
    return {
        **{"model": "m", "kind": kind, "budget": budget, "clients": clients},
        **{"steps": steps, "counts": {"waits": 2}, **sizes},
    }


def test_what_would_take_too_much_is_foreseen() -> None:
    assert memory.predict([], {"model": "m", "kind": "crowd", "budget": "", "clients": 512}) == math.inf
    assert memory.predict([], {"model": "m", "kind": "budget", "budget": "5MB", "clients": 512}) == 0
    assert memory.predict([case(1, 2e6), case(8, 9e6)], case(64, 0)) == 65e6


def test_the_memory_table_says_where_a_claim_does_not_hold() -> None:
    records = [case(1, 2e6), {"model": "m", "kind": "crowd", "budget": "", "clients": 512, "needs": 513e6}]
    records += [case(1, 2e6, "budget", "5MB"), case(64, 7e6, "budget", "5MB")]
    text = report.memory_text({"machine": MACHINE, "records": records})
    assert "not run: would need about 513" in text
    assert "**The budget was exceeded**: the highest peak is 7 MB, with 64 clients; **not all were served**" in text
    assert report.verdict(records[2:3]).endswith("every client was served.")
    assert "2.00 MB; adapter, version in use and two moments are 0.40 MB" in report.each_copy(
        [case(1, 1e6), case(3, 5e6)]
    )


def test_scale_is_told_by_client() -> None:
    spans = scale.spans(
        [
            {"event": "train", "round": 1, "tokens": 1, "seconds": 8.0, "cpu": 2.0, "trunk": {"resident_memory": 1}},
            {"event": "aggregate", "round": 1, "seconds": 1.0, "cpu": 3.0},
            {"event": "evaluate", "round": 1, "tokens": 1, "seconds": 4.0, "cpu": 6.0},
        ]
    )
    assert [span["cpu_seconds"] for span in spans] == [2.0, 4.0]
    record = {"clients": 4, "spans": spans, "peak_memory": {"client": 2e6}, "seconds_of_command": 9.0, "others": 0.0}
    text = report.scale_text({"machine": MACHINE, "flags": ["--x"], "records": [record]})
    assert "| 4 | 8 | 2 | 0.5 | 1 | 2 |  |  | 9 | 0% |" in text


def test_every_schedule_is_measured_and_every_flag_is_known() -> None:
    study = read_study(EXPERIMENT / "schedules.toml", DEFAULTS)
    assert {run.draft.checked().trunk.schedule for run in study.runs} == set(SCHEDULES)
    assert parse(scale.FLAGS).train.steps == 2


def test_the_rounds_of_a_study_are_collected_from_its_runs(tmp_path: Path) -> None:
    run = {"name": "shared-seed-0", "label": "shared", "seed": 0}
    (tmp_path / "comparison.json").write_text(json.dumps({"comparison": [], "runs": [run]}))
    folder = tmp_path / "runs" / run["name"]
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"parameters": {"trunk": {"trainable": 8, "total": 9}}}))
    trained = {"event": "train", "round": 1, "tokens": 4, "seconds": 2.0, "loss": 3.0, "trunk": {"steps": 1}}
    events: list[dict] = [
        {"event": "evaluate", "round": 0, "loss": 5.0, "forgotten": {}},
        {**trained, "clients": 2},
        {"event": "evaluate", "round": 1, "loss": 4.0, "forgotten": {"x": 0.5}},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (record,) = schedules.collected(tmp_path)["records"]
    assert record["schedule"] == "shared" and record["trains"] == {"trunk": 8}
    del trained["event"]
    expected = [{"round": 0, "held_out": 5.0, "forgotten": {}}, {**trained, "held_out": 4.0, "forgotten": {"x": 0.5}}]
    assert record["rounds"] == expected


@pytest.mark.parametrize("name", ["schedules", "memory", "scale"])
def test_the_readme_has_a_place_for_every_result(name: str, tmp_path: Path) -> None:
    shutil.copy(EXPERIMENT / "README.md", tmp_path)
    write_between(tmp_path / "README.md", f"{name}.json", "a table")
    assert "a table" in (tmp_path / "README.md").read_text()
