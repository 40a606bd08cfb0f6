"""Sums of virtual time, and who is a straggler."""

from __future__ import annotations

from fedsplit.network.times import PLACE_WORDS, PLACES, ClientTime, PhaseTime, stragglers_of


def test_every_place_has_words() -> None:
    assert tuple(PLACE_WORDS) == PLACES


def test_times_add_up() -> None:
    first, second = ClientTime(), ClientTime()
    first.add("others", 1.0)
    second.add("others", 2.0)
    second.add("wire_up", 4.0)
    first.add_all(second)
    assert first.seconds["others"] == 3.0 and first.total == 7.0


def test_a_phase_ends_with_the_last_answer() -> None:
    assert PhaseTime({0: 2.0, 1: 5.0}, {}).end == 5.0
    assert PhaseTime({}, {}).end == 0.0


def test_stragglers_are_later_than_half_again_the_median() -> None:
    assert stragglers_of({0: 1.0, 1: 1.0, 2: 1.5}) == []
    assert stragglers_of({0: 1.0, 1: 1.0, 2: 1.6, 3: 9.0, 4: 1.0}) == [3, 2]
    assert stragglers_of({0: 7.0}) == stragglers_of({}) == []
