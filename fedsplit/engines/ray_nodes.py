"""The nodes of a Ray cluster: resources, labels and versions, and checks for a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedsplit.errors import InputError
from fedsplit.events.versions import versions
from fedsplit.wire.tls import authority, problem

MUST_MATCH = ("python", "ray", "fedsplit", "torch", "transformers", "peft", "flwr")
"""Programs whose versions must be the driver's on every node."""

_PROBE_SECONDS = 60.0
"""Time that a node has to answer a question."""


@dataclass(frozen=True)
class Node:
    """A node of the cluster.

    Attributes:
        id: Ray's id of the node.
        address: IP address.
        resources: Amounts by name.
        labels: Labels of the node, set by the cluster's owner.
        versions: Versions of programs by name; empty for a missing program.
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
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in alive}
    # Python comes first, and is no distribution whose version could be looked up.
    versions_of = _ask(addresses, _version_probe(), MUST_MATCH[1:])
    found = []
    for node in alive:
        all_labels = node.get("Labels") or {}
        labels = {key: value for key, value in all_labels.items() if not key.startswith("ray.io/")}  # not Ray's own
        described = Node(
            id=node["NodeID"],
            address=node["NodeManagerAddress"],
            resources=node["Resources"],
            labels=labels,
            versions=versions_of[node["NodeID"]],
        )
        found.append(described)
    return sorted(found, key=lambda node: (node.address, node.id))


def _ask(
    addresses: Mapping[str, str],
    question: Callable[..., Any],
    *arguments: Any,
) -> dict[str, Any]:
    """Calls a function on nodes, all at once.

    Args:
        addresses: Addresses of the nodes by Ray's id.
        question: The function.
        *arguments: Its arguments.

    Returns:
        The results by Ray's id of the node.

    Raises:
        InputError: A node does not answer.
    """
    answers = {}
    for node in addresses:
        where = NodeAffinitySchedulingStrategy(node, soft=False)  # on this node, or not at all
        # No CPU is asked for, so that a node answers even while all of its cores are taken.
        answers[node] = ray.remote(num_cpus=0, scheduling_strategy=where)(question).remote(*arguments)
    _, silent = ray.wait(list(answers.values()), num_returns=len(answers), timeout=_PROBE_SECONDS)
    for node, answer in answers.items():
        if answer in silent:
            words = f"the node {addresses[node]} has not answered for {_PROBE_SECONDS:g} seconds"
            raise InputError(f"ray.address: {words}")
    return {node: ray.get(answer) for node, answer in answers.items()}


def _version_probe() -> Callable[[Sequence[str]], dict[str, str]]:
    """Returns a function that finds versions. Ray sends the function by value, since a node may lack fedsplit."""

    def probe(names: Sequence[str]) -> dict[str, str]:
        # Imported here, since the function travels without its module.
        import platform
        from importlib import metadata

        found = {"python": platform.python_version()}
        for name in names:
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                found[name] = ""
        return found

    return probe


def check_versions(nodes: Sequence[Node], ships: bool) -> None:
    """Checks that all nodes have the driver's versions, since tensors and code cross between nodes.

    Args:
        nodes: The nodes.
        ships: True if the run brings the code of fedsplit.

    Raises:
        InputError: A node lacks a program, or has a different version.
    """
    ours = versions()
    for node in nodes:
        for name in MUST_MATCH:
            theirs = node.versions.get(name, "")
            is_shipped = name == "fedsplit" and ships
            is_equal = _public(name, theirs) == _public(name, ours[name])
            if is_equal or is_shipped:
                continue
            has = f"has {name} {theirs}" if theirs else f"has no {name}"
            hint = "; --ray.ship brings it" if name == "fedsplit" else ""
            raise InputError(f"ray.address: the node {node.address} {has}, and {ours[name]} is needed{hint}")


def check_certificates(nodes: Sequence[Node], folder: str) -> None:
    """Checks that all nodes have certificates for TLS, from the authority trusted by this machine.

    Args:
        nodes: The nodes, whose fedsplit is ours.
        folder: Folder of the certificates on each node, as an absolute path.

    Raises:
        InputError: The certificates of a node cannot be used.
    """
    ours = authority(folder)
    answers = _ask({node.id: node.address for node in nodes}, _certificates, folder)
    for node in nodes:
        reason, theirs = answers[node.id]
        if reason:
            raise InputError(f"wire.tls: on the node {node.address}, {reason}")
        if theirs != ours:
            raise InputError(f"wire.tls: the node {node.address} has another {folder}/ca.pem than this machine")


def _certificates(folder: str) -> tuple[str, str]:
    """Returns the error in this machine's certificates, and the digest of the authority's certificate."""
    reason = problem(Path(folder))
    return reason, "" if reason else authority(folder)


def _public(name: str, version: str) -> str:
    """Returns the part of a version that must match: Python 3.11.7 is 3.11, and torch 2.13.0+cpu is 2.13.0."""
    return version.rpartition(".")[0] if name == "python" else version.partition("+")[0]


def table(
    nodes: Sequence[Node],
    trunks: Mapping[str, int],
    workers: Mapping[str, int],
) -> list[str]:
    r"""Returns the lines of a table of nodes.

    Args:
        nodes: The nodes.
        trunks: Number of the trunk's actors by id of the node.
        workers: Number of client processes by id of the node.

    Example:
        >>> node = Node("a1", "10.0.0.7", {"CPU": 8.0, "memory": 32e9}, {"site": "north"}, {})
        >>> print("\n".join(table([node], trunks={"a1": 1}, workers={"a1": 7})))
        node             CPUs  GPUs    memory  runs                     labels
        10.0.0.7            8     0     32 GB  trunk, 7 clients         site=north
    """
    lines = [f"{'node':<16} {'CPUs':>4}  {'GPUs':>4}  {'memory':>8}  {'runs':<24} labels"]
    for node in nodes:
        runs = []
        if count := trunks.get(node.id, 0):
            runs.append("trunk" if count == 1 else f"{count} trunks")
        if count := workers.get(node.id, 0):
            runs.append(f"{count} client{'s' if count > 1 else ''}")
        lines.append(
            f"{node.address:<16} {node.resources.get('CPU', 0):>4g}  {node.resources.get('GPU', 0):>4g}  "
            f"{node.resources.get('memory', 0) / 1e9:>5.0f} GB  {', '.join(runs) or '-':<24} {_labels(node)}".rstrip()
        )
    return lines


def _labels(node: Node) -> str:
    return ",".join(f"{key}={value}" for key, value in sorted(node.labels.items()))
