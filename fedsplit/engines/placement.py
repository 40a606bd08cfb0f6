"""Placement of a run's actors on a Ray cluster, by resources and by labels of nodes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from fedsplit.errors import SettingError
from fedsplit.settings.parsing import parse_labels, parse_resources

_FREE_SECONDS = 2.0
"""Time in which Ray finds room that is free, before the trunk asks others of the run for theirs."""

_NODE = "ray.io/node-id"
"""Label that Ray itself gives to each node."""

Options = dict[str, Any]
"""Options of a Ray actor."""


def actor_options(resources: str, label: str) -> Options:
    """Returns the options of an actor that asks for resources, on a node with labels.

    Args:
        resources: Amounts by name, as in a setting.
        label: Values by key, as in a setting.

    Example:
        >>> actor_options("CPU=2,GPU=0.5,licence=1", "site=north")
        {'num_cpus': 2.0, 'num_gpus': 0.5, 'resources': {'licence': 1.0}, 'label_selector': {'site': 'north'}}
    """
    amounts = dict(parse_resources(resources) or {})
    options: Options = {"num_cpus": amounts.pop("CPU", 0.0), "num_gpus": amounts.pop("GPU", 0.0)}
    if amounts:
        options["resources"] = amounts
    if labels := parse_labels(label):
        options["label_selector"] = labels
    return options


class Reservation:
    """Parts of nodes that Ray keeps for the trunk's actors before anything else is placed."""

    def __init__(
        self,
        resources: str,
        label: str,
        seconds: float,
        count: int = 1,
        together: bool = False,
        avoid: Collection[str] = (),
    ) -> None:
        """Asks for nothing yet.

        Args:
            resources: Amounts by name for each part, as in the setting `trunk.resources`.
            label: Labels of the nodes, as in the setting `trunk.label`.
            seconds: Time to wait for the parts.
            count: Number of parts, one for each actor.
            together: True for parts on one node. Otherwise Ray spreads the parts over the nodes.
            avoid: Ray's ids of nodes with client processes. Parts are placed on these nodes only as a last resort.
        """
        self._avoid = avoid
        self._count = count
        self._together = together
        self._resources = resources
        self._label = label
        self._seconds = seconds
        self._group: PlacementGroup | None = None

    def options(self, room: Callable[[], AbstractContextManager[object]] = nullcontext) -> list[Options]:
        """Waits for new parts, and returns the options of an actor in each part.

        Args:
            room: Called if there is no room. Inside the context, the run's clients give up their resources.

        Raises:
            SettingError: The nodes have no room for the parts. The message says what the nodes have.
        """
        self.release()  # the parts of an earlier trunk
        amounts = _amounts(self._resources)
        labels = parse_labels(self._label) or {}
        if not amounts:  # Ray reserves no part of nothing
            return [actor_options(self._resources, self._label) for _ in range(self._count)]

        # First choice: nodes that no client process needs, if room is free there at once.
        soon = min(_FREE_SECONDS, self._seconds)
        if self._avoid:
            avoided = ",".join(sorted(self._avoid))
            group = self._ask(amounts, {**labels, _NODE: f"!in({avoided})"})
            if group.wait(soon):
                return self._options_in(group)
            self.release()

        # Second choice: any node. The clients give up their resources only if no room is free.
        group = self._ask(amounts, labels)
        if not group.wait(soon):
            with room():
                is_placed = group.wait(self._seconds)
            if not is_placed:
                self.release()
                raise no_room("trunk", self._resources, self._label, self._seconds, self._count)
        return self._options_in(group)

    def _ask(self, amounts: Mapping[str, float], labels: Mapping[str, str]) -> PlacementGroup:
        """Asks for parts on nodes with labels, without waiting."""
        parts = [dict(amounts)] * self._count
        selector = [dict(labels)] * self._count if labels else None
        spreads = self._count > 1 and not self._together
        # One part alone is packed: it lies on one node in any case.
        strategy = "SPREAD" if spreads else "STRICT_PACK"
        self._group = placement_group(parts, strategy=strategy, bundle_label_selector=selector)
        return self._group

    def _options_in(self, group: PlacementGroup) -> list[Options]:
        """Returns the options of an actor in each part of a group."""
        all_options = []
        for part in range(self._count):
            options = actor_options(self._resources, "")  # no label: the part is on a node already
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=part)
            all_options.append(options)
        return all_options

    def parts_on(self, node: str) -> int:
        """Returns the number of parts on a node.

        Args:
            node: Ray's id of the node.
        """
        if self._group is None:
            return 0
        nodes: Mapping[int, str] = placement_group_table(self._group)["bundles_to_node_id"]
        return list(nodes.values()).count(node)

    def release(self) -> None:
        """Gives the parts back."""
        if self._group is not None:
            with contextlib.suppress(ray.exceptions.RayError):
                remove_placement_group(self._group)
            self._group = None


def nodes_with(label: str) -> list[str]:
    """Returns Ray's ids of the nodes with labels, as in a setting; no nodes for an empty setting."""
    wanted = parse_labels(label) or {}
    return [node["NodeID"] for node in _nodes() if wanted and _has(node, wanted)]


def no_room(
    who: str,
    resources: str,
    label: str,
    seconds: float,
    count: int = 1,
) -> SettingError:
    """Returns the error for an actor without room on any node.

    Args:
        who: "trunk" or "client".
        resources: Resources that the actor asks for.
        label: Labels that the node must have.
        seconds: Duration of the wait, in seconds.
        count: Number of actors, placed together.
    """
    wanted = parse_labels(label) or {}
    fitting = [node for node in _nodes() if _has(node, wanted)]
    if wanted and not fitting:
        return SettingError(f"{who}.label", label, f"labels of a node; there are {_all_labels() or 'none'}")

    # The message names the largest amount of each resource on any node, which is what a user may ask for.
    largest_amounts = []
    for name in parse_resources(resources) or {}:
        on_nodes = [node["Resources"].get(name, 0.0) for node in fitting]
        largest = max(on_nodes, default=0.0)
        largest_amounts.append(f"{name}={largest:g}")
    most = ",".join(largest_amounts)
    times = f" for each of {count} actors" if count > 1 else ""
    allowed = f"at most {most} on a node{times}, and as much must be free within {seconds:g} seconds (--ray.wait)"
    return SettingError(f"{who}.resources", resources, allowed)


def places(
    resources: str,
    label: str,
    taken: Mapping[str, float],
    count: int = 1,
) -> int:
    """Returns the number of actors for which the nodes have room.

    Args:
        resources: Resources that each actor asks for.
        label: Labels of the nodes.
        taken: Resources of each further actor, taken from the node that loses the fewest places.
        count: Number of further actors.
    """
    amounts = _amounts(resources)
    wanted = parse_labels(label) or {}
    rooms = [node["Resources"] for node in _nodes() if _has(node, wanted)]
    if not amounts:
        return sum(_fit(room, amounts) for room in rooms)

    def lost_places(room: Mapping[str, float]) -> int:
        return _fit(room, amounts) - _fit(_without(room, taken), amounts)

    # Where Ray will place the further actors is unknown. The count assumes the best place for each.
    for _ in range(count):
        hosts = [room for room in rooms if _has_room(room, taken)]
        if not hosts:
            break
        cheapest = min(hosts, key=lost_places)
        rooms[rooms.index(cheapest)] = _without(cheapest, taken)
    return sum(_fit(room, amounts) for room in rooms)


def room_on(node: str, resources: str, label: str, taken: Mapping[str, float]) -> int:
    """Returns the number of actors for which one node has room.

    Args:
        node: Ray's id of the node.
        resources: Resources that each actor asks for.
        label: Labels that the node must have.
        taken: Resources of further actors of the run on the node.
    """
    amounts = _amounts(resources)
    wanted = parse_labels(label) or {}
    for each in _nodes():
        if each["NodeID"] == node and _has(each, wanted):
            remaining = _without(each["Resources"], taken)
            return _fit(remaining, amounts)
    return 0


def _amounts(resources: str) -> dict[str, float]:
    """Returns the amounts by name in a setting, without amounts of 0.

    Example:
        >>> _amounts("CPU=2,GPU=0")
        {'CPU': 2.0}
    """
    parsed = parse_resources(resources) or {}
    return {name: amount for name, amount in parsed.items() if amount}


def _fit(room: Mapping[str, float], amounts: Mapping[str, float]) -> int:
    """Returns the number of actors with room for the amounts; 1 for an actor that asks for nothing.

    Example:
        >>> _fit({"CPU": 5.0}, {"CPU": 2.0}), _fit({"CPU": 5.0}, {"GPU": 1.0})
        (2, 0)
    """
    if not amounts:
        return 1
    by_resource = [int(room.get(name, 0.0) / amount) for name, amount in amounts.items()]
    return max(0, min(by_resource))


def _has_room(room: Mapping[str, float], amounts: Mapping[str, float]) -> bool:
    """Returns True if a node has the amounts."""
    return all(room.get(name, 0.0) >= amount for name, amount in amounts.items())


def _without(
    room: Mapping[str, float],
    taken: Mapping[str, float],
) -> dict[str, float]:
    """Returns the resources of a node that remain."""
    return {name: amount - taken.get(name, 0.0) for name, amount in room.items()}


def _nodes() -> Iterator[Mapping[str, Any]]:
    """Yields Ray's descriptions of the living nodes."""
    for node in ray.nodes():
        if node["Alive"]:
            yield node


def _has(node: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    there = node.get("Labels") or {}
    return all(there.get(key) == value for key, value in labels.items())


def _all_labels() -> str:
    """Returns the labels of all nodes, without Ray's default labels."""
    labels = set()
    for node in _nodes():
        for key, value in (node.get("Labels") or {}).items():
            if not key.startswith("ray.io/"):
                labels.add(f"{key}={value}")
    return ", ".join(sorted(labels))


def this_node() -> str:
    """Returns Ray's id of the node of this process."""
    node: str = ray.get_runtime_context().get_node_id()
    return node
