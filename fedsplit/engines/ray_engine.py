"""The engine `ray`: clients in a pool of Ray actors behind Flower's grid, the trunk in an actor of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from fedsplit.engines.flower_clients import FlowerClients
from fedsplit.engines.planning import Plan
from fedsplit.engines.pool_grid import PoolGrid, load_client
from fedsplit.engines.ray_host import RayHost
from fedsplit.engines.server_thread import run_in_thread
from fedsplit.engines.stalls import StallWatch
from fedsplit.engines.worker_pool import WorkerPool
from fedsplit.federation import records
from fedsplit.federation.federation import Federation
from fedsplit.objects import NOTHING, Objects
from fedsplit.settings.config import Config
from fedsplit.shutdown import kill_descendants
from fedsplit.trunk import cluster


class RaySession(RayHost):
    """A Ray with the trunk's actor and a pool of client processes."""

    def __init__(self, config: Config, plan: Plan, has_stage: bool) -> None:
        """Starts the trunk and the client processes, which load while the caller goes on."""
        super().__init__(config, plan, has_stage)
        self.pool = WorkerPool(plan.workers, load_client)

    def play(self, federation: Federation) -> None:
        """Runs a federation to its end."""
        grid = PoolGrid(self.pool, self.config.clients)
        timeout = self.config.timeout
        stalls = StallWatch(timeout, lambda: self.trunk.status().traffic, self.pool.kill_busy)
        clients = FlowerClients(grid, federation.stop, self.plan.workers, stalls, timeout, wait=grid.wait)

        def loop() -> None:
            with records.named_run():
                federation.run(clients)

        run_in_thread(federation, loop, lambda: kill_descendants("ray::"))


@contextlib.contextmanager
def running(config: Config, plan: Plan, objects: Objects = NOTHING) -> Iterator[RaySession]:
    """Starts Ray, the trunk's actor and the client processes.

    Args:
        config: Configuration of the run.
        plan: Processes, threads and lanes.
        objects: The strategy; clients and trunk load its stage by its name.

    Raises:
        ClusterFailed: Ray does not start.
    """
    with cluster.running(plan.workers):
        session = RaySession(config, plan, objects.has_stage)
        try:
            yield session
        finally:
            session.pool.close()
