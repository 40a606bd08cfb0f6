"""The nodes of a Ray cluster: what each of them has, and whether it can play a part of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedsplit.errors import InputError
from fedsplit.events.versions import versions

MUST_MATCH = ("python", "ray", "fedsplit", "torch", "transformers", "peft", "flwr")
"""Programs whose versions must be the driver's on every node."""

_PROBE_SECONDS = 60.0
"""Time that a node has to tell its versions."""


@dataclass(frozen=True)
class Node:
    """A node of the cluster.

    Attributes:
        id: Ray's id of the node.
        address: IP address.
        resources: Amounts by name.
        labels: Labels that somebody has given the node.
        versions: Versions of programs by name; empty for a program that is not there.
    """

    id: str
    address: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]
    versions: Mapping[str, str]


def survey() -> list[Node]:
    """Asks every node for its versions, and returns the nodes in the order of their addresses.

    Raises:
        InputError: A node does not answer.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    answers = {node["NodeID"]: _ask(node["NodeID"]) for node in alive}
    _, silent = ray.wait(list(answers.values()), num_returns=len(answers), timeout=_PROBE_SECONDS)
    found = []
    for node in alive:
        answer = answers[node["NodeID"]]
        address = node["NodeManagerAddress"]
        if answer in silent:
            raise InputError(f"ray.address: the node {address} has not answered for {_PROBE_SECONDS:g} seconds")
        labels = {key: value for key, value in (node.get("Labels") or {}).items() if not key.startswith("ray.io/")}
        found.append(Node(node["NodeID"], address, node["Resources"], labels, ray.get(answer)))
    return sorted(found, key=lambda node: (node.address, node.id))


def _ask(node: str) -> ray.ObjectRef:
    """Asks a node for its versions. The function travels by value, since the node may lack fedsplit."""

    def probe(names: Sequence[str]) -> dict[str, str]:
        import platform
        from importlib import metadata

        found = {"python": platform.python_version()}
        for name in names:
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                found[name] = ""
        return found

    where = NodeAffinitySchedulingStrategy(node, soft=False)
    answer: ray.ObjectRef = ray.remote(num_cpus=0, scheduling_strategy=where)(probe).remote(MUST_MATCH[1:])
    return answer


def check_versions(nodes: Sequence[Node], ships: bool) -> None:
    """Makes sure that all nodes have the driver's versions, since tensors and code cross between them.

    Args:
        nodes: The nodes.
        ships: True if the run brings the code of fedsplit.

    Raises:
        InputError: A node has another version of a program, or lacks it.
    """
    ours = versions()
    for node in nodes:
        for name in MUST_MATCH:
            theirs = node.versions.get(name, "")
            if _public(name, theirs) == _public(name, ours[name]) or (name == "fedsplit" and ships):
                continue
            has = f"has {name} {theirs}" if theirs else f"has no {name}"
            hint = "; --ray.ship brings it" if name == "fedsplit" else ""
            raise InputError(f"ray.address: the node {node.address} {has}, and {ours[name]} is needed{hint}")


def _public(name: str, version: str) -> str:
    """Returns the part of a version that must match: Python 3.11.7 is 3.11, and torch 2.13.0+cpu is 2.13.0."""
    return version.rpartition(".")[0] if name == "python" else version.partition("+")[0]


def table(nodes: Sequence[Node], trunk: str, workers: Mapping[str, int]) -> list[str]:
    r"""Returns the lines of a table of nodes.

    Args:
        nodes: The nodes.
        trunk: Id of the node with the trunk.
        workers: Number of client processes by id of the node.

    Example:
        >>> node = Node("a1", "10.0.0.7", {"CPU": 8.0, "memory": 32e9}, {"site": "north"}, {})
        >>> print("\n".join(table([node], trunk="a1", workers={"a1": 7})))
        node             CPUs  GPUs    memory  runs                     labels
        10.0.0.7            8     0     32 GB  trunk, 7 clients         site=north
    """
    lines = [f"{'node':<16} {'CPUs':>4}  {'GPUs':>4}  {'memory':>8}  {'runs':<24} labels"]
    for node in nodes:
        runs = ["trunk"] if node.id == trunk else []
        if count := workers.get(node.id, 0):
            runs.append(f"{count} client{'s' if count > 1 else ''}")
        lines.append(
            f"{node.address:<16} {node.resources.get('CPU', 0):>4g}  {node.resources.get('GPU', 0):>4g}  "
            f"{node.resources.get('memory', 0) / 1e9:>5.0f} GB  {', '.join(runs) or '-':<24} {_labels(node)}".rstrip()
        )
    return lines


def _labels(node: Node) -> str:
    return ",".join(f"{key}={value}" for key, value in sorted(node.labels.items()))
