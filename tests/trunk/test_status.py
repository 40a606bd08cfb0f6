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


def test_bytes_by_client_add_up_and_a_copy_keeps_its_own() -> None:
    first = Bytes()
    first.add(client=0, up=3, down=5)
    before = first.copy()
    second = Bytes()
    second.add(client=0, up=1, down=0)
    second.add(client=2, up=4, down=6)
    first.add(client=0, up=1, down=1)
    assert (before.up_by_client, before.down_by_client) == ({0: 3}, {0: 5})
    joined = first + second
    assert (joined.up, joined.up_by_client, joined.down_by_client) == (9, {0: 5, 2: 4}, {0: 6, 2: 6})


def test_framing_and_packets_are_apart_from_the_bytes_of_arrays() -> None:
    traffic = Traffic()
    crossed = traffic.gradient
    crossed.add(client=1, up=8, down=4)
    crossed.framing.add(client=1, up=300, down=200)
    crossed.packets.add(client=1, up=1, down=1)
    twice = crossed + crossed.copy()
    assert (twice.up, twice.framing.up, twice.packets.down_by_client) == (16, 600, {1: 2})
    assert (crossed.framing.up, crossed.packets.up) == (300, 1)
    assert traffic.document() == {"gradient_up": 8, "gradient_down": 4}
    assert traffic.ledger()["framing.gradient_down"] == 200
    assert traffic.by_client()["packets.gradient_up"] == {1: 1}


def test_taking_the_counts_of_a_round_resets_them() -> None:
    counts = RoundCounts(steps=2, late=1)
    finished = counts.take()
    counts.steps += 5
    assert finished == RoundCounts(steps=2, late=1)
    assert finished.document() == {"steps": 2, "late": 1}
    assert counts == RoundCounts(steps=5)
