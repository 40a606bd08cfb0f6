"""Where a run's actors sit on a Ray cluster: the resources that they ask for, and the labels of their nodes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from fedsplit.errors import SettingError
from fedsplit.settings.parsing import parse_labels, parse_resources

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
    """A part of a node that Ray keeps for the trunk before anything else is placed."""

    def __init__(self, resources: str, label: str, seconds: float) -> None:
        """Asks for the part.

        Args:
            resources: Amounts by name, as in the setting `trunk.resources`.
            label: Labels of the node, as in the setting `trunk.label`.
            seconds: Time to wait for the part.
        """
        self._resources = resources
        self._label = label
        self._seconds = seconds
        self._group: PlacementGroup | None = None

    def options(self) -> Options:
        """Waits for the part, a new one at each call, and returns the options of an actor in it.

        Raises:
            SettingError: No node has room for the part. The message says what the nodes have.
        """
        self.release()
        amounts = {name: amount for name, amount in (parse_resources(self._resources) or {}).items() if amount}
        labels = parse_labels(self._label) or {}
        if not amounts:
            return actor_options(self._resources, self._label)
        selector = [labels] if labels else None
        group = placement_group([amounts], strategy="STRICT_PACK", bundle_label_selector=selector)
        self._group = group
        if not group.wait(self._seconds):
            self.release()
            raise no_room("trunk", self._resources, self._label, self._seconds)
        options = actor_options(self._resources, "")
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
        return options

    def release(self) -> None:
        """Gives the part back."""
        if self._group is not None:
            with contextlib.suppress(ray.exceptions.RayError):
                remove_placement_group(self._group)
            self._group = None


def no_room(who: str, resources: str, label: str, seconds: float) -> SettingError:
    """Returns the error that no node has room for an actor.

    Args:
        who: "trunk" or "client".
        resources: Resources that the actor asks for.
        label: Labels of the node that it asks for.
        seconds: Time that was waited for.
    """
    wanted = parse_labels(label) or {}
    fitting = [node for node in _nodes() if _has(node, wanted)]
    if wanted and not fitting:
        return SettingError(f"{who}.label", label, f"labels of a node; there are {_all_labels() or 'none'}")
    amounts = parse_resources(resources) or {}
    most = {name: max((node["Resources"].get(name, 0.0) for node in fitting), default=0.0) for name in amounts}
    there = ",".join(f"{name}={amount:g}" for name, amount in most.items())
    what = f"at most {there} on a node, and as much must be free within {seconds:g} seconds (--ray.wait)"
    return SettingError(f"{who}.resources", resources, what)


def places(resources: str, label: str, taken: Mapping[str, float]) -> int:
    """Returns the number of actors for which the nodes have room.

    Args:
        resources: Resources that each actor asks for.
        label: Labels of the nodes.
        taken: Resources that others of the run take; from the node on which they cost the fewest places.
    """
    amounts = {name: amount for name, amount in (parse_resources(resources) or {}).items() if amount}
    wanted = parse_labels(label) or {}
    rooms = [node["Resources"] for node in _nodes() if _has(node, wanted)]
    whole = sum(_fit(room, amounts) for room in rooms)
    if not amounts or not rooms:
        return whole
    hosts = [room for room in rooms if all(room.get(name, 0.0) >= amount for name, amount in taken.items())]
    if not hosts:
        return whole
    cost = min(_fit(room, amounts) - _fit(_without(room, taken), amounts) for room in hosts)
    return whole - cost


def _fit(room: Mapping[str, float], amounts: Mapping[str, float]) -> int:
    if not amounts:
        return 1
    return min(int(room.get(name, 0.0) / amount) for name, amount in amounts.items())


def _without(room: Mapping[str, float], taken: Mapping[str, float]) -> dict[str, float]:
    return {name: amount - taken.get(name, 0.0) for name, amount in room.items()}


def _nodes() -> Iterator[Mapping[str, Any]]:
    """Yields the nodes that are alive, as Ray describes them."""
    for node in ray.nodes():
        if node["Alive"]:
            yield node


def _has(node: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    there = node.get("Labels") or {}
    return all(there.get(key) == value for key, value in labels.items())


def _all_labels() -> str:
    """Returns the labels of all nodes that somebody has given them, not Ray itself."""
    found = {f"{key}={value}" for node in _nodes() for key, value in (node.get("Labels") or {}).items()}
    return ", ".join(sorted(label for label in found if not label.startswith("ray.io/")))


def this_node() -> str:
    """Returns Ray's id of the node on which this process is."""
    node: str = ray.get_runtime_context().get_node_id()
    return node
