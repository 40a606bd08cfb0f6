"""Counts of the trunk: their names in files, and that a report does not change afterwards."""

from __future__ import annotations

from fedsplit.trunk.status import Bytes, RoundCounts, Traffic


def test_traffic_is_named_by_purpose_and_direction() -> None:
    traffic = Traffic(gradient=Bytes(up=3, down=5), evaluation_activation=Bytes(down=7))
    assert traffic.document() == {"gradient_up": 3, "gradient_down": 5, "evaluation_activation_down": 7}


def test_a_copy_of_traffic_stays_as_it_was() -> None:
    traffic = Traffic()
    before = traffic.copy()
    traffic.token.up += 1
    assert before == Traffic() != traffic


def test_taking_the_counts_of_a_round_resets_them() -> None:
    counts = RoundCounts(steps=2, late=1)
    finished = counts.take()
    counts.steps += 5
    assert finished == RoundCounts(steps=2, late=1)
    assert finished.document() == {"steps": 2, "late": 1}
    assert counts == RoundCounts(steps=5)
