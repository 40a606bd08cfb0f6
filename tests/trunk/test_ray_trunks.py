"""All actors of a trunk: their names, blocks and places."""

from __future__ import annotations

from typing import Any

import pytest

from fedsplit.settings.documents import build
from fedsplit.trunk import ray_trunks
from fedsplit.trunk.actor import ActorSetup, Seat


def test_every_actor_has_its_blocks_its_place_and_the_name_of_the_next_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    seats: list[tuple[Seat, Any]] = []

    def start(config: Any, seat: Seat, setup: ActorSetup, options: Any) -> Any:
        seats.append((seat, options))
        return seat.name

    monkeypatch.setattr(ray_trunks, "start_trunk", start)
    config = build(
        {"cut": "1:5", "trunk.stages": "1:2:5", "trunk.replicas": 2, "trunk.schedule": "batched", "trunk.sync": "step"}
    )
    options = [{"num_cpus": number} for number in range(4)]
    trunks = ray_trunks.start_trunks(config, "t", ActorSetup(threads=1), options)
    by_name = {seat.name: seat for seat, _ in seats}
    assert trunks._actors == ["t", "t/0/1", "t/1/0", "t/1/1"]  # type: ignore[comparison-overlap]
    assert [by_name[name].rest for name in by_name] == ["", "t/0/1", "", "t/1/1"]
    assert {(seat.span.low, seat.span.high) for seat, _ in seats if seat.span} == {(1, 2), (2, 5)}
    assert [(seat.replica, seat.master) for seat, _ in seats] == [(0, ""), (0, ""), (1, "t/0/1"), (1, "t")]
    assert sorted(place["num_cpus"] for _, (place,) in seats) == [0, 1, 2, 3]
    assert len({seat.incarnation for seat, _ in seats}) == 1 and {seat.run for seat, _ in seats} == {"t"}


def test_processes_that_share_a_trunk_are_the_first_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[Any] = []
    monkeypatch.setattr(ray_trunks, "start_trunk", lambda config, seat, setup, options: places.append(options))
    options = [{"num_cpus": number} for number in range(2)]
    ray_trunks.start_trunks(build({"trunk.tensor_parallel": 2}), "t", ActorSetup(threads=1), options)
    ray_trunks.start_trunks(build({"trunk.tensor_parallel": 2}), "t", ActorSetup(threads=1))
    (of_both, none) = places
    assert sorted(place["num_cpus"] for place in of_both) == [0, 1] and none is None
