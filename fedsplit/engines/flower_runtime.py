"""The engine of `flwr run`: clients and Ray are started by Flower's runtime, and the trunk is an actor in that Ray."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from flwr.serverapp import Grid

from fedsplit.engines.flower_engine import FlowerSession
from fedsplit.engines.planning import Plan
from fedsplit.engines.server_thread import run_in_thread
from fedsplit.engines.session import Open
from fedsplit.environment import check_closed
from fedsplit.federation.federation import Federation
from fedsplit.objects import NOTHING, Objects
from fedsplit.settings.config import Config
from fedsplit.shutdown import bounded, kill_descendants
from fedsplit.trunk import cluster

RAY_SECONDS = 600.0
"""Time in which Flower's runtime must have started Ray. It loads the ClientApp first, which takes seconds."""


def wait_for_ray() -> None:
    """Waits until Flower's runtime has started Ray. The ServerApp begins in a second thread, before Ray.

    Raises:
        ClusterFailed: The runtime starts no Ray in this process. Under SuperNodes, for example, there is none.
        InputError: Ray was imported before it could be closed to others.
    """
    check_closed()
    cluster.wait_until_started(RAY_SECONDS)


class RuntimeSession(FlowerSession):
    """The trunk's actor in the Ray of Flower's runtime."""

    def __init__(self, config: Config, plan: Plan, has_stage: bool, grid: Grid) -> None:
        """Starts the trunk's actor.

        Args:
            config: Configuration of the run.
            plan: Processes, threads and lanes.
            has_stage: True if the strategy has a gradient stage.
            grid: Flower's connection to the nodes.
        """
        super().__init__(config, plan, has_stage)
        self._grid = grid

    def play(self, federation: Federation) -> None:
        """Runs a federation to its end."""

        def loop() -> None:
            federation.run(self.clients(self._grid, federation))

        run_in_thread(federation, loop, lambda: kill_descendants("ray::"))


def opens(grid: Grid) -> Open:
    """Returns the function that starts the engine for a run.

    Args:
        grid: Flower's connection to the nodes.
    """

    @contextlib.contextmanager
    def running(config: Config, plan: Plan, objects: Objects = NOTHING) -> Iterator[RuntimeSession]:
        with cluster.joined("auto"):
            session = RuntimeSession(config, plan, objects.has_stage, grid)
            try:
                yield session
            finally:
                bounded(session.trunk.kill)  # Ray, which is asked to end actors, may hang

    return running
