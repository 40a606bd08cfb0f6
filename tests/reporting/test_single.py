"""The sections on one run."""

from __future__ import annotations

import json
from pathlib import Path

from reported_runs import write_run

from fedsplit.reporting.run_record import read_run
from fedsplit.reporting.single import data_section, key_figures, loss_section, page_of, troubles


def test_the_first_numbers_of_a_classifier_are_its_accuracy_and_no_perplexity(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", **{"data.format": "classification"})
    document = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**document, "accuracy": {"before": 0.25, "after": 0.75}}))
    found = dict(key_figures(read_run(run)))
    assert found["accuracy"] == "25.00% → 75.00%" and "perplexity" not in found
    assert found["bytes of training"] == "4.0 kB"


def test_a_baseline_is_named_in_the_figures(tmp_path: Path) -> None:
    run, baseline = read_run(write_run(tmp_path / "run")), read_run(write_run(tmp_path / "alone"))
    section = loss_section(run, baseline)
    assert ">alone<" in section.pictures[0].svg and "held-out loss of alone" in section.pictures[0].caption


def test_failures_are_listed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert troubles(read_run(run)).is_empty
    failed = {"event": "client-failed", "round": 1, "client_name": "bob", "reason": "no luck", "refused": True}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(failed) + "\n")
    (table,) = troubles(read_run(run)).tables
    assert table.body == [("1", "client failed (refused)", "bob", "no luck")]


def test_clients_beyond_a_table_are_counted(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", names=tuple(map(str, range(300))), rounds=1))
    (table,) = data_section(run).folded
    assert len(table.body) == 200 and table.note == "… and 100 more"


def test_a_run_without_training_or_evaluation_has_the_sections_that_it_can(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text("")
    titles = [section.title for section in page_of(read_run(run)).sections if not section.is_empty]
    assert titles == ["Data", "Traffic", "Adapters", "Memory", "Settings and origin"]
