"""The engine `flower`: clients in Flower's simulation engine, and the trunk in a separate Ray actor."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsplit.engines.flower_clients import FlowerClients
from fedsplit.engines.planning import Plan
from fedsplit.engines.ray_host import RayHost
from fedsplit.engines.server_thread import run_in_thread
from fedsplit.engines.stalls import StallWatch
from fedsplit.federation.federation import Federation
from fedsplit.objects import NOTHING, Objects
from fedsplit.settings.config import Config
from fedsplit.shutdown import bounded, kill_descendants
from fedsplit.trunk import cluster

_BUSY_WORKER = "ray::ClientAppActor.run"
"""Beginning of the command line of a process that plays a client now, as Ray names it."""


def kill_busy_workers() -> None:
    """Kills the processes at work. Ray starts new processes, and Flower reports the clients as failed."""
    kill_descendants(_BUSY_WORKER)


class FlowerSession(RayHost):
    """A private Ray with the trunk's actor. Flower starts the client processes."""

    def play(self, federation: Federation) -> None:
        """Runs a federation to its end."""

        def loop() -> None:
            simulate(self._app(federation), self.config.clients)

        run_in_thread(federation, loop, lambda: kill_descendants("ray::"))

    def clients(self, grid: Grid, federation: Federation) -> FlowerClients:
        """Returns the clients of a federation behind Flower's grid."""
        timeout = self.config.timeout
        stalls = StallWatch(timeout, lambda: self.trunk.status().traffic, kill_busy_workers)
        return FlowerClients(grid, federation.stop, self.plan.workers, stalls, timeout)

    def _app(self, federation: Federation) -> ServerApp:
        """Returns the ServerApp that runs a federation."""
        app = ServerApp()

        @app.main()
        def main(grid: Grid, context: Context) -> None:
            try:
                federation.run(self.clients(grid, federation))
            except BaseException:
                kill_busy_workers()  # Flower waits for their answers, which may never come
                raise

        return app


@contextlib.contextmanager
def running(config: Config, plan: Plan, objects: Objects = NOTHING) -> Iterator[FlowerSession]:
    """Starts Ray and the trunk's actor.

    Args:
        config: Configuration of the run.
        plan: Processes, threads and lanes.
        objects: The strategy; clients and trunk load its stage by its name.

    Raises:
        ClusterFailed: Ray does not start.
    """
    with cluster.running(plan.workers):
        session = FlowerSession(config, plan, objects.has_stage)
        try:
            yield session
        finally:
            if config.trunk.server:  # which serves the next run; an actor of Ray's has ended with Ray
                bounded(session.trunk.kill)


def simulate(server: ServerApp, clients: int) -> None:
    """Runs the apps in Flower's engine, on the Ray that is running already.

    Args:
        server: The ServerApp that runs the federation.
        clients: Number of clients.
    """
    # Deprecated without a public replacement: `flwr run` ends in the same engine.
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.CRITICAL + 1)  # not before the import, which sets it anew

    from fedsplit.engines.client_app import app

    # A worker that dies is started again, as often as it takes: its slot would fail every client from then on.
    resources: dict[str, Any] = {"num_cpus": 1, "num_gpus": 0.0, "max_restarts": -1}
    run_simulation(server, app, clients, backend_config={"client_resources": resources})
