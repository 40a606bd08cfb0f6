"""What metrics.jsonl lacks, by what summary.json and the settings say."""

from __future__ import annotations

from pathlib import Path

from reported_runs import write_run

from fedsplit.reporting.completeness import missing_events
from fedsplit.reporting.page import html_of
from fedsplit.reporting.run_record import read_run


def test_rounds_that_were_cut_off_are_named_and_their_bytes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", rounds=3)
    assert not [*missing_events(read_run(run))]
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:8]))  # the last event is the aggregation of round 2
    events, crossed = missing_events(read_run(run))
    assert "ends with round 3, but there is no event train of round 3, no event evaluate of rounds 2 to 3, no" in events
    assert "3.0 kB (3,000 bytes) instead of 8.0 kB (8,000 bytes)" in crossed
    page = html_of([read_run(run)])
    assert events in page and crossed in page


def test_rounds_that_need_no_evaluation_lack_none(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", rounds=5, **{"eval.every": 2})
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    left_out = ('"evaluate", "round": 1', '"evaluate", "round": 3')
    (run / "metrics.jsonl").write_text("".join(line for line in lines if not any(words in line for words in left_out)))
    assert not [*missing_events(read_run(run))]
    (run / "metrics.jsonl").write_text("".join(line for line in lines if '"evaluate", "round": 5' not in line))
    assert "no event evaluate of round 5." in next(missing_events(read_run(run)))
