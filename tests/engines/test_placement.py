"""Where actors sit: what they ask Ray for, how many have room, and what is said where none has."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from fedsplit.engines import placement
from fedsplit.engines.placement import actor_options, no_room, places


def node(labels: dict[str, str] | None = None, alive: bool = True, **resources: float) -> dict[str, Any]:
    facts = {"Alive": alive, "Resources": resources, "NodeID": f"with {resources['CPU']} CPUs"}
    return {**facts, "Labels": {"ray.io/node-id": "x", **(labels or {})}}


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
        self.has_room = sum(bundle.get("GPU", 0) for bundle in bundles) <= 2
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
    (first,) = reservation.options()
    assert (first["num_cpus"], first["num_gpus"], "label_selector" in first) == (1.0, 1.0, False)
    assert groups[0].bundles == [{"CPU": 1.0, "GPU": 1.0}]
    assert groups[0].options["bundle_label_selector"] == [{"site": "north"}]
    assert first["scheduling_strategy"].placement_group is groups[0]
    reservation.options()  # for another trunk, where the first one was lost
    assert [group.is_released for group in groups] == [True, False]
    reservation.release()
    assert all(group.is_released for group in groups)


def test_each_actor_of_several_has_a_part_of_its_own(groups: list[Group]) -> None:
    options = placement.Reservation("GPU=1", "site=north", 5.0, count=2).options()
    assert groups[0].bundles == [{"GPU": 1.0}] * 2 and groups[0].options["strategy"] == "SPREAD"
    assert groups[0].options["bundle_label_selector"] == [{"site": "north"}] * 2
    assert [one["scheduling_strategy"].placement_group_bundle_index for one in options] == [0, 1]
    with pytest.raises(placement.SettingError, match="for each of 2 actors"):
        placement.Reservation("GPU=2", "", 5.0, count=2).options()


def test_processes_that_share_a_trunk_have_parts_of_one_node(groups: list[Group]) -> None:
    placement.Reservation("GPU=1", "site=north", 5.0, count=2, together=True).options()
    assert groups[0].options == {"strategy": "STRICT_PACK", "bundle_label_selector": [{"site": "north"}] * 2}


@pytest.mark.parametrize("elsewhere", [True, False])
def test_the_trunk_leaves_nodes_to_clients_that_need_them_if_it_can(
    elsewhere: bool, groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, str]] = []

    def ask(bundles: list[dict[str, float]], **options: Any) -> Group:
        group = Group(bundles, **options)
        asked.append(options["bundle_label_selector"][0])
        group.has_room = elsewhere or len(asked) == 2
        return group

    monkeypatch.setattr(placement, "placement_group", ask)
    placement.Reservation("CPU=1", "site=north", 5.0, avoid={"b", "a"}).options()
    first, *others = asked
    assert first == {"site": "north", "ray.io/node-id": "!in(a,b)"}
    assert others == ([] if elsewhere else [{"site": "north"}])
    assert [group.is_released for group in groups] == ([False] if elsewhere else [True, False])


def test_a_part_that_nobody_has_is_refused_and_not_asked_for_any_more(groups: list[Group]) -> None:
    with pytest.raises(placement.SettingError, match=r"^trunk.resources: GPU=4 is not possible; .* at most GPU=2"):
        placement.Reservation("GPU=4", "", 5.0).options()
    assert groups[0].is_released


def test_a_trunk_that_asks_for_nothing_needs_no_part(groups: list[Group]) -> None:
    nothing = {"num_cpus": 0.0, "num_gpus": 0.0}
    assert placement.Reservation("CPU=0", "", 5.0, count=2).options() == [nothing, nothing]
    assert groups == []


@pytest.mark.parametrize(
    ("there", "resources", "label", "taken", "count"),
    [
        ("with 4 CPUs", "CPU=1", "", {}, 4),
        ("with 4 CPUs", "CPU=1", "", {"CPU": 3.0}, 1),
        ("with 4 CPUs", "CPU=1", "", {"CPU": 6.0}, 0),
        ("with 4 CPUs", "CPU=1", "site=north", {}, 0),
        ("with 8 CPUs", "CPU=1,GPU=0.5", "site=north", {"GPU": 1.0}, 2),
        ("with 64 CPUs", "CPU=1", "", {}, 0),  # not alive
        ("nowhere", "CPU=1", "", {}, 0),
    ],
)
@pytest.mark.usefixtures("nodes")
def test_the_room_of_one_node_is_counted(
    there: str, resources: str, label: str, taken: dict[str, float], count: int
) -> None:
    assert placement.room_on(there, resources, label, taken) == count


def test_the_trunks_parts_on_a_node_are_counted(groups: list[Group], monkeypatch: pytest.MonkeyPatch) -> None:
    reservation = placement.Reservation("CPU=1", "", 5.0, count=3)
    assert reservation.parts_on("a") == 0
    reservation.options()
    monkeypatch.setattr(
        placement, "placement_group_table", lambda group: {"bundles_to_node_id": {0: "a", 1: "b", 2: "a"}}
    )
    assert [reservation.parts_on(node) for node in "abc"] == [2, 1, 0]
