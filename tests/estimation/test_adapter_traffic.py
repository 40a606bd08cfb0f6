"""The server's side, played on invented updates; test_run_traffic.py compares it with runs."""

from __future__ import annotations

import pytest

from fedsplit.estimation.adapter_traffic import PLAYED, rounds_of_adapters
from fedsplit.estimation.party_shapes import Parties
from fedsplit.federation.messages import serialised_bytes
from fedsplit.settings.documents import build


def test_adapters_go_down_from_the_second_round_on() -> None:
    parties = Parties(build({"clients": 3, "rounds": 2}))
    shapes = parties.adapters(["bottom", "top"]).tensors
    whole = serialised_bytes({name: tensor.new_zeros(tensor.shape, device="cpu") for name, tensor in shapes.items()})
    start, first, second = rounds_of_adapters(parties)
    assert not start.down and start.measured == whole
    assert sum(first.up.values()) == 3 * whole and not sum(first.down.values())
    assert second.down == dict.fromkeys(range(3), whole)


def test_a_head_of_any_size_is_counted_by_its_shape() -> None:
    """Its values are never made: of a large model they would be gigabytes."""
    plain = rounds_of_adapters(Parties(build({"clients": 1, "rounds": 1})))[1].up[0]
    with_head = rounds_of_adapters(Parties(build({"clients": 1, "rounds": 1, "lm_head": "full"})))[1]
    assert with_head.up[0] - plain == 1024 * 128 * 4 + 128  # numpy's header has 128 bytes


@pytest.mark.parametrize("strategy", ["rolora", "fedavg"])
def test_later_rounds_repeat_the_last_two_in_turn(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parties = Parties(build({"clients": 2, "rounds": PLAYED + 3, "strategy": strategy}))
    rounds = rounds_of_adapters(parties)
    monkeypatch.setattr("fedsplit.estimation.adapter_traffic.PLAYED", PLAYED + 3)
    assert rounds_of_adapters(parties) == rounds
