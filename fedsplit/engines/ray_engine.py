"""The engine `ray`: clients in a pool of Ray actors behind Flower's grid, the trunk in an actor of its own."""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from fedsplit.engines import placement, ray_nodes
from fedsplit.engines.client_files import Shipping
from fedsplit.engines.flower_clients import FlowerClients
from fedsplit.engines.planning import Plan
from fedsplit.engines.pool_grid import PoolGrid, load_client
from fedsplit.engines.ray_host import RayHost
from fedsplit.engines.server_thread import run_in_thread
from fedsplit.engines.stalls import StallWatch
from fedsplit.engines.worker_pool import WorkerPool
from fedsplit.errors import SettingError
from fedsplit.federation import records
from fedsplit.federation.federation import Federation
from fedsplit.objects import NOTHING, Objects
from fedsplit.settings.config import Config
from fedsplit.settings.parsing import parse_resources
from fedsplit.shutdown import kill_descendants
from fedsplit.trunk import cluster

_REST_SECONDS = 15.0
"""Time to wait for further client processes as soon as there is one."""


class RaySession(RayHost):
    """A Ray with the trunk's actor and a pool of client processes."""

    def __init__(self, config: Config, plan: Plan, has_stage: bool) -> None:
        """Starts the trunk and the client processes, which load while the caller goes on.

        Raises:
            SettingError: The cluster has no room for the trunk, or for a client process.
        """
        trunk, client = config.trunk, config.client
        self._reservation = placement.Reservation(trunk.resources, trunk.label, config.ray.wait)
        super().__init__(config, plan, has_stage, self._reservation.options)
        self.pool = WorkerPool(self._size, load_client, placement.actor_options(client.resources, client.label))

    def _size(self) -> int:
        """Returns the number of client processes for which there is room."""
        config = self.config
        if config.ray.address == "local" or config.workers:
            return self.plan.workers
        taken = parse_resources(config.trunk.resources) or {}
        room = placement.places(config.client.resources, config.client.label, taken)
        return max(1, min(room, config.clients))

    def settle(self) -> None:
        """Waits until a client process has its place, and for a moment for the others; more may join later.

        Raises:
            SettingError: The cluster has no room for a client process, or for too few.
        """
        config = self.config
        if not self.pool.wait_for_places(1, config.ray.wait):
            raise placement.no_room("client", config.client.resources, config.client.label, config.ray.wait)
        workers = self.pool.wait_for_places(self._size(), min(_REST_SECONDS, config.ray.wait))
        if config.deterministic and config.trunk.group > workers:
            raise SettingError("trunk.group", config.trunk.group, f"1 to {workers}, the number of client processes")

    def play(self, federation: Federation) -> None:
        """Runs a federation to its end."""
        config, timeout = self.config, self.config.timeout
        ships = config.ray.address != "local" and config.data.at == "driver"
        shipping = Shipping(federation.disks) if ships else None
        grid = PoolGrid(self.pool, config.clients, shipping, placement.this_node())
        stalls = StallWatch(timeout, lambda: self.trunk.status().traffic, self.pool.kill_busy)
        clients = FlowerClients(grid, federation.stop, self.plan.workers, stalls, timeout, wait=grid.wait)

        def loop() -> None:
            with records.named_run():
                federation.run(clients)

        run_in_thread(federation, loop, self.kill)

    def kill(self) -> None:
        """Ends all actors of the run, at once."""
        kill_descendants("ray::")  # on this machine also those that do not hear Ray
        self.pool.close()
        self.trunk.kill()

    def close(self) -> None:
        """Ends all actors of the run, and gives back what Ray kept for them."""
        self.pool.close()
        self.trunk.kill()
        self._reservation.release()


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
        with _session(config, plan, objects) as session:
            session.settle()
            workers = Counter(place.node for place in session.pool.places())
            session.notes += ray_nodes.table(nodes, session.trunk.node(), workers)
            session.plan = replace(plan, workers=sum(workers.values()))
            yield session


@contextlib.contextmanager
def _session(config: Config, plan: Plan, objects: Objects) -> Iterator[RaySession]:
    session = RaySession(config, plan, objects.has_stage)
    try:
        yield session
    finally:
        session.close()


def _cpus(config: Config, plan: Plan) -> int:
    """Returns the CPUs that Ray needs for trunk and client processes of this machine; threads are the plan's matter."""
    client, trunk = (parse_resources(part.resources) or {} for part in (config.client, config.trunk))
    return math.ceil(plan.workers * client.get("CPU", 0.0) + trunk.get("CPU", 0.0))
