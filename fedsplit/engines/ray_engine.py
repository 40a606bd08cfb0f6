"""The engine `ray`: clients in a pool of Ray actors behind Flower's grid, the trunk in an actor of its own."""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from fedsplit.engines import client_data, placement, ray_nodes
from fedsplit.engines.client_data import PinnedClients, SharedFolder
from fedsplit.engines.client_files import Carrier, Shipping
from fedsplit.engines.flower_clients import FlowerClients
from fedsplit.engines.planning import Plan
from fedsplit.engines.pool_grid import PoolGrid, load_client
from fedsplit.engines.ray_host import RayHost
from fedsplit.engines.server_thread import run_in_thread
from fedsplit.engines.stalls import StallWatch
from fedsplit.engines.worker_pool import WorkerPool
from fedsplit.errors import SettingError
from fedsplit.federation import records
from fedsplit.federation.clients import FederationFailed
from fedsplit.federation.federation import Federation
from fedsplit.objects import NOTHING, Objects
from fedsplit.settings.config import Config
from fedsplit.settings.parsing import parse_resources
from fedsplit.shutdown import bounded, kill_descendants
from fedsplit.trunk import cluster
from fedsplit.trunk.doors import count

_REST_SECONDS = 15.0
"""Time to wait for further client processes as soon as there is one."""


class RaySession(RayHost):
    """A Ray with the trunk's actor and a pool of client processes."""

    def __init__(
        self,
        config: Config,
        plan: Plan,
        has_stage: bool,
        home: Mapping[int, str] | None = None,
    ) -> None:
        """Starts the trunk and the client processes, which load while the caller goes on.

        Args:
            config: Configuration of the run.
            plan: Processes, threads and lanes.
            has_stage: True if the strategy has a gradient stage.
            home: Ray's id of the only node that may play a client, by client; None if all may.

        Raises:
            SettingError: The cluster has no room for the trunk, or for a client process.
        """
        trunk = config.trunk
        client = config.client
        self._home = home or {}
        self._reservation = placement.Reservation(
            trunk.resources,
            trunk.label,
            config.ray.wait,
            count(config),
            together=trunk.tensor_parallel > 1,  # pieces of one projection exchange every hidden state
            avoid={*self._home.values()} or placement.nodes_with(client.label),  # their room is for clients
        )
        super().__init__(config, plan, has_stage, self._reservation.options)
        self._nodes = self._nodes_of_workers()
        options = placement.actor_options(client.resources, client.label)
        self.pool = WorkerPool(self._size, load_client, options, self._nodes)

    def _nodes_of_workers(self) -> list[str]:
        """Returns the node of each client process, if clients have homes: a process for each home, then as room allows.

        Raises:
            SettingError: The run has fewer client processes than homes, or a home has no room for a client process.
        """
        clients_of = Counter(self._home.values())
        if self.config.workers and self.config.workers < len(clients_of):
            allowed = f"at least {len(clients_of)}, one for each node with clients, or 0"
            raise SettingError("workers", self.config.workers, allowed)
        taken = parse_resources(self.config.trunk.resources) or {}
        client = self.config.client
        rooms = {}
        for node, clients in clients_of.items():
            beside = {name: amount * self._reservation.parts_on(node) for name, amount in taken.items()}
            # More processes than a node has clients would have nothing to do.
            rooms[node] = min(clients, placement.room_on(node, client.resources, client.label, beside))
            if not rooms[node]:
                raise placement.no_room("client", client.resources, client.label, self.config.ray.wait)
        # In turns, so that every home has a process even if --workers cuts the list.
        nodes = []
        for number in range(max(rooms.values(), default=0)):
            nodes += [node for node, room in rooms.items() if number < room]
        return nodes[: self.config.workers or None]

    def _size(self) -> int:
        """Returns the number of client processes that fit into the cluster."""
        config = self.config
        if self._nodes:
            return len(self._nodes)
        if config.ray.address == "local" or config.workers:
            return self.plan.workers
        taken = parse_resources(config.trunk.resources) or {}
        room = placement.places(config.client.resources, config.client.label, taken, count(config))
        # At least one: it waits for room, and `settle` says what is missing if none comes.
        return max(1, min(room, config.clients))

    def renew(self) -> None:
        """Starts a new trunk. Without room for the trunk, the client processes end, and start again after the trunk.

        Raises:
            FederationFailed: The cluster has no room for a trunk any more.
        """
        # Only now: for the first trunk there was no client process that could make room.
        self._place = lambda: self._reservation.options(self.pool.away)
        try:
            super().renew()
        except SettingError as error:
            raise FederationFailed(f"the trunk was lost, and has no place any more: {error}") from error

    def settle(self) -> None:
        """Waits until a client process has its place, and for a moment for the others; more may join later.

        Raises:
            SettingError: The cluster has no room for a client process, or for too few.
        """
        config = self.config
        homes = {*self._home.values()}
        self.pool.wait_for_places(1, config.ray.wait, homes)
        nodes = {place.node for place in self.pool.places()}
        if not nodes or homes - nodes:
            raise placement.no_room("client", config.client.resources, config.client.label, config.ray.wait)
        workers = self.pool.wait_for_places(self._size(), min(_REST_SECONDS, config.ray.wait))
        if config.deterministic and config.trunk.group > workers:
            raise SettingError("trunk.group", config.trunk.group, f"1 to {workers}, the number of client processes")

    def play(self, federation: Federation) -> None:
        """Runs a federation to its end."""
        config = self.config
        timeout = config.timeout
        # On one machine all processes see the folder of the clients' disks.
        carrier = None if config.ray.address == "local" else self._carrier(federation.disks)
        grid = PoolGrid(self.pool, config.clients, carrier)
        stalls = StallWatch(timeout, lambda: self.trunk.status().traffic, self.pool.kill_busy)
        clients = FlowerClients(
            grid, federation.stop, self.plan.workers, stalls, timeout, wait=grid.wait, shipped=grid.shipped
        )

        def loop() -> None:
            with records.named_run():
                federation.run(clients)

        run_in_thread(federation, loop, self.kill)

    def _carrier(self, disks: Path) -> Carrier:
        """Returns the carrier of clients' files.

        Args:
            disks: Folder of the clients' disks in the run's folder.
        """
        match self.config.data.at:
            case "label":
                return PinnedClients(self.config, disks, placement.this_node(), self._home)
            case "shared":
                return SharedFolder(disks)
            case _:
                return Shipping(disks, placement.this_node())

    def kill(self) -> None:
        """Ends all actors of the run, at once."""
        kill_descendants("ray::")  # on this machine also those that do not hear Ray
        self.pool.close()
        self.trunk.kill()

    def close(self) -> None:
        """Ends all actors of the run, and frees their resources."""
        self.pool.close()
        self.trunk.kill()
        self._reservation.release()
        self.pool.join()


@contextlib.contextmanager
def running(config: Config, plan: Plan, objects: Objects = NOTHING) -> Iterator[RaySession]:
    """Starts Ray, or joins a cluster; starts the trunk's actor and the client processes.

    Args:
        config: Configuration of the run.
        plan: Processes, threads and lanes.
        objects: The strategy; clients and trunk load its stage by its name.

    Raises:
        ClusterFailed: Ray does not start, or no cluster answers.
        InputError: The cluster cannot play the run.
    """
    if config.ray.address == "local":
        with cluster.running(_cpus(config, plan)), _session(config, plan, objects) as session:
            if os.environ.get("RAY_ADDRESS"):
                session.notes.append("RAY_ADDRESS is set, and not used: --ray.address auto would")
            yield session
        return

    with cluster.joined(config.ray.address, config.ray.ship):
        nodes = ray_nodes.survey()
        ray_nodes.check_versions(nodes, config.ray.ship)
        if config.wire.tls:
            tls = str(Path(config.wire.tls).resolve())  # processes of other nodes have other working folders
            config = replace(config, wire=replace(config.wire, tls=tls))
            ray_nodes.check_certificates(nodes, tls)
        is_pinned = config.data.at == "label"
        home = {}
        if is_pinned:
            home = client_data.homes({node.id: node.labels for node in nodes}, config.clients)
        with _session(config, plan, objects, home) as session:
            session.settle()
            workers = Counter(place.node for place in session.pool.places())
            session.notes += ray_nodes.table(nodes, Counter(session.trunk.nodes()), workers)
            if is_pinned:
                session.notes += client_data.table(home, {node.id: node.address for node in nodes})
            # Ray's own switch for TLS between its processes.
            if config.wire.tls and os.environ.get("RAY_USE_TLS", "0") != "1":
                session.notes.append("packets are encrypted; what Ray carries, such as adapters and data, is not")
            # Room in the cluster has decided about the processes, and not the cores of this machine.
            session.plan = replace(plan, workers=sum(workers.values()))
            yield session


@contextlib.contextmanager
def _session(
    config: Config, plan: Plan, objects: Objects, home: Mapping[int, str] | None = None
) -> Iterator[RaySession]:
    """Starts a session, and closes the session at the end of the context."""
    session = RaySession(config, plan, objects.has_stage, home)
    try:
        yield session
    finally:
        bounded(session.close)  # Ray, which is asked to end actors, may hang


def _cpus(config: Config, plan: Plan) -> int:
    """Returns the CPUs to declare to Ray for trunk and client processes. The plan limits the threads."""
    of_client = parse_resources(config.client.resources) or {}
    of_trunk = parse_resources(config.trunk.resources) or {}
    clients = plan.workers * of_client.get("CPU", 0.0)
    trunks = count(config) * of_trunk.get("CPU", 0.0)
    return math.ceil(clients + trunks)
