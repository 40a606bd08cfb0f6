"""The sections on bytes, seconds and memory."""

from __future__ import annotations

from pathlib import Path

from reported_runs import write_run

from fedsplit.reporting.costs import memory, time_spent, traffic
from fedsplit.reporting.run_record import read_run


def test_tables_hold_the_sums_over_all_rounds(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", names=("ann", "bob"))
    (run / "summary.json").unlink()  # of a run at work
    record = read_run(run)
    assert traffic(record).tables[0].body == [("hidden states", "2.0 kB", "2.0 kB"), ("evaluation", "1.5 kB", "0 B")]
    (by_client,) = traffic(record).folded
    assert by_client.body[0][:2] == ("ann", "1.0 kB")
    assert time_spent(record).folded[0].body[1] == ("bob", "3.00", "0.30")
    assert memory(record).folded[0].body == [("ann", "100.0 MB"), ("bob", "100.0 MB")]
