"""Where actors sit: what they ask Ray for, how many have room, and what is said where none has."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from fedsplit.engines import placement
from fedsplit.engines.placement import actor_options, no_room, places


def node(labels: dict[str, str] | None = None, alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"Alive": alive, "Resources": resources, "Labels": {"ray.io/node-id": "x", **(labels or {})}}


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    there = [
        node(CPU=4, memory=8e9),
        node({"site": "north"}, CPU=8, GPU=2),
        node({"site": "north", "zone": "1"}, CPU=2),
        node({"site": "south"}, alive=False, CPU=64, GPU=8),
    ]
    monkeypatch.setattr(ray, "nodes", lambda: there)


@pytest.mark.parametrize(
    ("resources", "label", "options"),
    [
        ("CPU=1", "", {"num_cpus": 1.0, "num_gpus": 0.0}),
        ("", "", {"num_cpus": 0.0, "num_gpus": 0.0}),
        ("GPU=0.25,fast=2", "a=b", {"num_cpus": 0.0, "num_gpus": 0.25, "resources": {"fast": 2.0}}),
    ],
)
def test_resources_and_labels_become_options_of_an_actor(resources: str, label: str, options: dict) -> None:
    expected = options | ({"label_selector": {"a": "b"}} if label else {})
    assert actor_options(resources, label) == expected


@pytest.mark.parametrize(
    ("resources", "label", "taken", "count"),
    [
        ("CPU=1", "", {}, 14),
        ("CPU=1", "", {"CPU": 1.0}, 13),
        ("CPU=3", "", {}, 3),
        ("CPU=3", "", {"CPU": 2.0}, 3),  # the last two CPUs of the node with eight, or the node with two
        ("CPU=1,GPU=0.5", "", {}, 4),
        ("CPU=1,GPU=0.5", "", {"GPU": 1.0}, 2),
        ("CPU=1", "site=north", {}, 10),
        ("CPU=1", "site=north,zone=1", {}, 2),
        ("CPU=1", "site=south", {}, 0),
        ("GPU=3", "", {}, 0),
        ("", "", {}, 3),
    ],
)
@pytest.mark.usefixtures("nodes")
def test_the_room_is_counted_node_by_node(resources: str, label: str, taken: dict[str, float], count: int) -> None:
    """Nodes that are not alive have none, and an actor cannot lie on two nodes."""
    assert places(resources, label, taken) == count


@pytest.mark.parametrize(
    ("resources", "label", "words"),
    [
        (
            "GPU=3",
            "",
            "trunk.resources: GPU=3 is not possible; allowed: at most GPU=2 on a node, and as much must be free",
        ),
        ("licence=1", "", "trunk.resources: licence=1 is not possible; allowed: at most licence=0 on a node"),
        ("CPU=9,GPU=1", "site=north", "trunk.resources: CPU=9,GPU=1 is not possible; allowed: at most CPU=8,GPU=2 on"),
        (
            "CPU=1",
            "site=west",
            "trunk.label: site=west is not possible; allowed: labels of a node; there are site=north, zone=1",
        ),
    ],
)
@pytest.mark.usefixtures("nodes")
def test_what_is_missing_is_named(resources: str, label: str, words: str) -> None:
    said = str(no_room("trunk", resources, label, 5.0))
    assert said.startswith(words) and "\n" not in said


class Group:
    """A placement group that has its part, or does not get it."""

    made: list[Group] = []  # noqa: RUF012

    def __init__(self, bundles: list[dict[str, float]], **options: Any) -> None:
        self.bundles, self.options = bundles, options
        self.has_room = bundles[0].get("GPU", 0) <= 2
        self.is_released = False
        Group.made.append(self)

    def wait(self, seconds: float) -> bool:
        return self.has_room


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch, nodes: None) -> list[Group]:
    monkeypatch.setattr(Group, "made", [])
    monkeypatch.setattr(placement, "placement_group", Group)
    monkeypatch.setattr(placement, "remove_placement_group", lambda group: setattr(group, "is_released", True))
    return Group.made


def test_the_trunks_part_is_kept_before_and_given_back(groups: list[Group]) -> None:
    reservation = placement.Reservation("CPU=1,GPU=1", "site=north", 5.0)
    first = reservation.options()
    assert (first["num_cpus"], first["num_gpus"], "label_selector" in first) == (1.0, 1.0, False)
    assert groups[0].bundles == [{"CPU": 1.0, "GPU": 1.0}]
    assert groups[0].options["bundle_label_selector"] == [{"site": "north"}]
    assert first["scheduling_strategy"].placement_group is groups[0]
    reservation.options()  # for another trunk, where the first one was lost
    assert [group.is_released for group in groups] == [True, False]
    reservation.release()
    assert all(group.is_released for group in groups)


def test_a_part_that_nobody_has_is_refused_and_not_asked_for_any_more(groups: list[Group]) -> None:
    with pytest.raises(placement.SettingError, match=r"^trunk.resources: GPU=4 is not possible; .* at most GPU=2"):
        placement.Reservation("GPU=4", "", 5.0).options()
    assert groups[0].is_released


def test_a_trunk_that_asks_for_nothing_needs_no_part(groups: list[Group]) -> None:
    assert placement.Reservation("CPU=0", "", 5.0).options() == {"num_cpus": 0.0, "num_gpus": 0.0}
    assert groups == []
