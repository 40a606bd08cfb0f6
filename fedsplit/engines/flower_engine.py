"""The engine on Ray: clients in Flower's simulation engine, the trunk in an actor of its own."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from typing import Any, Protocol

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsplit.engines.flower_clients import FlowerClients
from fedsplit.engines.planning import Plan
from fedsplit.engines.stalls import StallWatch
from fedsplit.federation.federation import Federation
from fedsplit.objects import NOTHING, Objects
from fedsplit.settings.config import Config
from fedsplit.shutdown import kill_descendants
from fedsplit.trunk import cluster
from fedsplit.trunk.actor import start_trunk
from fedsplit.watchdog import Watchdog

_BUSY_WORKER = "ray::ClientAppActor.run"
"""Beginning of the command line of a process that plays a client now, as Ray names it."""

_LOOK_SECONDS = 0.2
"""Time between two looks at whether the engine has ended; in between, signals are heard."""

_END_SECONDS = 5.0
"""Time that the engine has to end after an interrupt."""


def kill_busy_workers() -> None:
    """Kills processes that play a client now; Ray starts others, and Flower reports their clients as failed."""
    kill_descendants(_BUSY_WORKER)


class Stoppable(Protocol):
    """The part of a federation that the engine's thread needs.

    Attributes:
        stop: Ends the server's loop at its next look.
        watchdog: Tells whether the server's thread hangs.
    """

    stop: threading.Event
    watchdog: Watchdog


class FlowerSession:
    """A Ray on this machine with the trunk's actor.

    Attributes:
        trunk: The trunk.
        name: Name of the trunk's actor; names the run, too.
    """

    def __init__(self, config: Config, plan: Plan, has_stage: bool) -> None:
        """Starts the trunk's actor, which loads while the caller goes on.

        Args:
            config: Configuration of the run.
            plan: Processes, threads and lanes.
            has_stage: True if the strategy has a gradient stage, which the trunk loads by its name.
        """
        self._config = config
        self._plan = plan
        self._has_stage = has_stage
        self._start()

    def _start(self) -> None:
        plan = self._plan
        self.name = f"trunk-{os.getpid()}-{time.time_ns()}"
        self.trunk = start_trunk(
            self._config, self.name, plan.trunk_threads, plan.trunk_lanes, has_stage=self._has_stage
        )

    def renew(self) -> None:
        """Kills the trunk's actor, if it is not dead already, and starts another one."""
        self.trunk.kill()
        self._start()

    def play(self, federation: Federation) -> None:
        """Runs a federation to its end."""
        simulate(federation, self._app(federation), self._config.clients)

    def _app(self, federation: Federation) -> ServerApp:
        """Returns the ServerApp that runs a federation."""
        app = ServerApp()

        @app.main()
        def main(grid: Grid, context: Context) -> None:
            stalls = StallWatch(self._config.timeout, lambda: self.trunk.status().traffic, kill_busy_workers)
            try:
                federation.run(FlowerClients(grid, federation.stop, self._plan.workers, stalls, self._config.timeout))
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
        yield FlowerSession(config, plan, objects.has_stage)


class _Engine(threading.Thread):
    """Flower's engine in a thread of its own: its pool of threads would hold the main thread up for ever."""

    def __init__(self, server: ServerApp, clients: int) -> None:
        super().__init__(daemon=True, name="flower")
        self._server = server
        self._clients = clients
        self.error: BaseException | None = None

    def run(self) -> None:
        # Deprecated without a public replacement: `flwr run` ends in the same engine.
        from flwr.simulation import run_simulation

        logging.getLogger("flwr").setLevel(logging.CRITICAL + 1)  # not before the import, which sets it anew

        from fedsplit.engines.client_app import app

        # A worker that dies is started again, as often as it takes: its slot would fail every client from then on.
        resources: dict[str, Any] = {"num_cpus": 1, "num_gpus": 0.0, "max_restarts": -1}
        try:
            run_simulation(self._server, app, self._clients, backend_config={"client_resources": resources})
        except BaseException as error:  # noqa: BLE001  # the main thread raises it
            self.error = error


def simulate(federation: Stoppable, server: ServerApp, clients: int) -> None:
    """Runs the apps in Flower's engine, on the Ray that is running already.

    Args:
        federation: The federation; its `stop` is set at the end.
        server: The ServerApp that runs it.
        clients: Number of clients.

    Raises:
        Exception: Whatever ended the server's loop.
        Hung: Code of the user's does not return; no client works any more then.
        KeyboardInterrupt: The caller was interrupted; no client works any more then.
    """
    engine = _Engine(server, clients)
    try:
        engine.start()
        while engine.is_alive():
            engine.join(_LOOK_SECONDS)
            federation.watchdog.check()
    except BaseException:
        federation.stop.set()
        # Flower waits for its clients, and the server may wait for the trunk: neither would ever look at `stop`.
        kill_descendants("ray::")
        engine.join(_END_SECONDS)
        raise
    federation.stop.set()
    if engine.error is not None:
        raise engine.error
