"""The sections on bytes, seconds and memory."""

from __future__ import annotations

import json
from pathlib import Path

from reported_runs import write_run

from fedsplit.reporting.costs import memory, time_spent, traffic, virtual_time
from fedsplit.reporting.run_record import read_run
from fedsplit.reporting.series import loss_against


def test_tables_hold_the_sums_over_all_rounds(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", names=("ann", "bob"))
    (run / "summary.json").unlink()  # of a run at work
    record = read_run(run)
    assert traffic(record).tables[0].body == [("hidden states", "2.0 kB", "2.0 kB"), ("evaluation", "1.5 kB", "0 B")]
    (by_client,) = traffic(record).folded
    assert by_client.body[0][:2] == ("ann", "1.0 kB")
    assert time_spent(record).folded[0].body[1] == ("bob", "3.00", "0.30")
    assert memory(record).folded[0].body == [("ann", "100.0 MB"), ("bob", "100.0 MB")]


def test_virtual_time_is_summed_by_client_and_place(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", names=("ann", "bob"))
    assert virtual_time(read_run(run)).is_empty
    with (run / "metrics.jsonl").open("a") as file:
        unused = {
            "event": "client-unused",
            "round": 2,
            "client_name": "bob",
            "cause": "surplus",
            "reason": "1 is enough",
        }
        file.write(json.dumps(unused) + "\n")
        for round in (1, 2):
            places = {"wire_up": 2.0 * round, "client_compute": 1.0, "others": "broken"}
            event = {"event": "network", "round": round, "virtual_elapsed": 5.0 * round, "clients": {"ann": places}}
            file.write(json.dumps(event) + "\n")
    record = read_run(run)
    (table,) = virtual_time(record).tables
    assert table.body == [("ann", "2.00", "6.00", "0.00", "0.00", "0.00", "0.00", "8.00")]
    (uncounted,) = virtual_time(record).folded
    assert uncounted.body == [("2", "bob", "not needed (over-selection)", "1 is enough")]
    assert [seconds for seconds, _ in loss_against(record, "virtual")] == [5.0, 10.0]
