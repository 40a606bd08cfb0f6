"""Seconds of rounds; test_phase_clock.py compares them with runs."""

from __future__ import annotations

import pytest
from small_estimates import estimated


def test_the_run_is_the_sum_of_its_rounds() -> None:
    found = estimated(rounds=14, clients=2, train__steps=1, eval__every=5, eval__samples=4)
    assert [number for number, one in enumerate(found.rounds) if one.evaluation] == [0, 5, 10, 14]
    assert not found.rounds[0].training and all(one.training for one in found.rounds[1:])
    assert found.run_seconds == sum(one.training + one.evaluation for one in found.rounds)
    assert found.rounds[13].training == found.rounds[11].training
    assert found.rounds[12].total == pytest.approx(found.rounds[12].training)


def test_evaluation_shares_the_trunk() -> None:
    one, many = (estimated(network="lan", rounds=1, clients=count, train__steps=1) for count in (1, 40))
    assert many.seconds.evaluation > 4 * one.seconds.evaluation


def test_adapters_on_the_way_are_no_crowd() -> None:
    """Of a round with few steps, adapters are most of the bytes; two clients do not fill a line of a gigabit."""
    assert estimated(clients=2, rounds=2, train__steps=1, train__max_length=16).seconds.limit == "wire"
