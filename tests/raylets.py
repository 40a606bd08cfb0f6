"""A Ray cluster of several nodes on this machine, in a process of its own, as somebody else would have started it.

Run as a script it obeys requests, one JSON line each: `python raylets.py FOLDER`.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
"""Folder of the package, which the nodes' processes import."""

TOKEN = "0123456789abcdef" * 4
"""Token of the cluster, so that no other user of this machine can call it."""


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """Returns the environment of the cluster and of commands: nothing of another Ray, files of Ray in a folder."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
    return {**inherited, **own, "RAY_USAGE_STATS_ENABLED": "0", **variables}


class Raylets:
    """A cluster. Each node has a folder of its own for temporary files, as if it were a machine.

    Attributes:
        folder: Folder of the cluster's files.
        address: Address of the cluster.
        added: Label by id of the nodes that were added, and have not been removed.
    """

    def __init__(self) -> None:
        """Starts the cluster with a head node of one CPU, whose label is site=a."""
        self._made = tempfile.TemporaryDirectory(prefix="fs-", dir="/tmp")  # paths of sockets must be short
        self.folder = Path(self._made.name)
        call = [sys.executable, __file__, str(self.folder)]
        self._server = subprocess.Popen(
            call,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(self.folder, TMPDIR=str(_temporary(self.folder, "head"))),
        )
        self.added: dict[str, str] = {}
        self.address: str = self._ask("address")

    def __enter__(self) -> Raylets:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        try:
            self._server.communicate(timeout=60)
        finally:
            self._server.kill()
            self._made.cleanup()

    def _ask(self, what: str, **arguments: Any) -> Any:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps([what, arguments]) + "\n")
        self._server.stdin.flush()
        for line in self._server.stdout:
            if line.startswith("= "):
                return json.loads(line[2:])
        raise AssertionError("the cluster has ended")

    def environment(self, **variables: str) -> dict[str, str]:
        """Returns the environment of a command that joins the cluster."""
        return environment(self.folder, **variables)

    def add(self, site: str, cpus: int = 1, labels: Mapping[str, str] | None = None, **variables: str) -> str:
        """Adds a node with the label `site`, others, and variables of its environment; returns Ray's id of the node."""
        node: str = self._ask("add", labels={"site": site, **(labels or {})}, cpus=cpus, variables=variables)
        self.added[node] = site
        return node

    def remove(self, node: str) -> None:
        """Kills all processes of a node."""
        del self.added[node]
        self._ask("remove", node=node)

    def state(self) -> dict[str, Any]:
        """Returns the living actors (class, node, pid), the placement groups, the free and the whole CPUs."""
        state: dict[str, Any] = self._ask("state")
        return state

    def answering(self) -> int:
        """Has a task run on each node; returns the number of nodes."""
        count: int = self._ask("answering")
        return count

    def actors(self, kind: str) -> list[dict[str, Any]]:
        """Returns the actors of a class that are alive, with their nodes and process numbers."""
        return [actor for actor in self.state()["actors"] if actor["kind"] == kind and actor["pid"]]

    def wait_until_free(self, cpus: float, seconds: float = 240.0) -> dict[str, Any]:
        """Waits until nothing of a run is left on a cluster of some CPUs, or a time has passed; returns the state."""
        until = time.monotonic() + seconds
        while True:
            state = self.state()
            is_free = not state["actors"] and not state["groups"] and state["free"] == state["whole"] == cpus
            if is_free or time.monotonic() > until:
                return state
            time.sleep(0.2)

    def left_files_soon(self, seconds: float = 60.0) -> list[str]:
        """Waits until runs have left no files, or a time has passed; returns the files that are left."""
        until = time.monotonic() + seconds
        while self.left_files() and time.monotonic() < until:
            time.sleep(0.1)
        return self.left_files()

    def left_files(self) -> list[str]:
        """Returns the files and folders that runs have left in the nodes' folders for temporary files."""
        found = (self.folder / "nodes").glob("*/fedsplit-*/*")
        return sorted(str(path.relative_to(self.folder)) for path in found)


def _temporary(folder: Path, name: str) -> Path:
    """Makes the folder for temporary files of a node."""
    made = folder / "nodes" / name
    made.mkdir(parents=True)
    return made


def _number() -> int:
    return 1


class _Server:
    """The cluster's side of `Raylets`; its methods are the requests."""

    def __init__(self, folder: Path) -> None:
        import ray
        from ray.cluster_utils import Cluster

        self._ray = ray
        self._folder = folder
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 1,
                "include_dashboard": False,
                "labels": {"site": "a"},
                "_system_config": {"health_check_period_ms": 1000},  # a lost node is noticed in 5 seconds, not in 15
            },
        )
        self._nodes: dict[str, Any] = {}
        ray.init(address=self._cluster.address, namespace="tests", log_to_driver=False, logging_level=50)

    def address(self) -> str:
        return str(self._cluster.address)

    def add(self, labels: Mapping[str, str], cpus: int, variables: Mapping[str, str]) -> str:
        place = _temporary(self._folder, f"node-{len(list((self._folder / 'nodes').iterdir()))}")
        env_vars = {"TMPDIR": str(place), "HOME": str(place), **variables}
        node = self._cluster.add_node(num_cpus=cpus, labels=dict(labels), env_vars=env_vars)
        self._nodes[node.node_id] = node
        return str(node.node_id)

    def answering(self) -> int:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = [node["NodeID"] for node in self._ray.nodes() if node["Alive"]]
        places = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
        tasks = [self._ray.remote(num_cpus=1, scheduling_strategy=place)(_number).remote() for place in places]
        return sum(self._ray.get(tasks, timeout=60))

    def remove(self, node: str) -> None:
        import psutil

        removed = self._nodes.pop(node)
        raylet = psutil.Process(removed.all_processes["raylet"][0].process.pid)
        doomed = [raylet, *raylet.children(recursive=True)]  # alone, they would go on for a second or two
        for process in doomed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._cluster.remove_node(removed, allow_graceful=False)

    def state(self) -> dict[str, Any]:
        from ray._private.state import actors

        living = [actor for actor in actors().values() if actor["State"] != "DEAD"]
        facts = [
            {"kind": each["ActorClassName"], "node": each["Address"]["NodeID"], "pid": each["Pid"]} for each in living
        ]
        groups = [group for group in self._ray.util.placement_group_table().values() if group["state"] != "REMOVED"]
        free, whole = self._ray.available_resources(), self._ray.cluster_resources()
        return {
            "actors": facts,
            "groups": len(groups),
            "free": free.get("CPU", 0.0),
            "whole": whole.get("CPU", 0.0),
        }

    def close(self) -> None:
        self._ray.shutdown()
        self._cluster.shutdown()


def main() -> None:
    """Obeys requests until the end of the input."""
    server = _Server(Path(sys.argv[1]))
    try:
        for line in sys.stdin:
            what, arguments = json.loads(line)
            print("=", json.dumps(getattr(server, what)(**arguments)), flush=True)
    finally:
        server.close()


if __name__ == "__main__":
    main()
