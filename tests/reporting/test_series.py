"""Numbers of a run as series."""

from __future__ import annotations

from pathlib import Path

import pytest
from reported_runs import write_run

from fedsplit.reporting.run_record import read_run
from fedsplit.reporting.series import bytes_by_round, loss_against, losses, seconds_by_round, totals_by_client


def test_losses_stand_against_what_was_spent_when_they_were_measured(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    assert loss_against(run, "bytes") == [(0, 3.0), (2000, 2.9), (4000, 2.8)]
    assert loss_against(run, "seconds") == [(2, 3.0), (3.5, 2.9), (5, 2.8)]


def test_before_aggregation_is_the_loss_less_what_was_forgotten(tmp_path: Path) -> None:
    found = losses(read_run(write_run(tmp_path / "run")))
    assert [round for round, _ in found.own] == [1, 2] and found.before == 3.0
    assert [loss for _, loss in found.own] == pytest.approx([2.91, 2.81])
    assert found.clients["ann"][-1] == pytest.approx((2, 2.8))


def test_kinds_and_phases_that_never_happened_are_left_out(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    assert [*bytes_by_round(run)] == ["hidden states", "evaluation"]
    assert bytes_by_round(run)["hidden states"].up == [(0, 0), (1, 1000), (2, 1000)]
    assert [*seconds_by_round(run)] == ["training", "evaluation", "start and other"]
    assert totals_by_client(run, "client_seconds")["training"]["ann"] == 3.0
