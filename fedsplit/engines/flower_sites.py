"""The engine of a federation of real parties: clients at sites behind Flower's SuperNodes, the trunk at a server."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from flwr.serverapp import Grid

from fedsplit.engines.flower_clients import FlowerClients
from fedsplit.engines.planning import Plan
from fedsplit.engines.server_thread import run_in_thread
from fedsplit.engines.session import Open
from fedsplit.engines.stalls import StallWatch
from fedsplit.engines.trunk_places import ServerPlace
from fedsplit.federation.federation import Federation
from fedsplit.objects import NOTHING, Objects
from fedsplit.settings.config import Config
from fedsplit.shutdown import bounded


class SitesSession:
    """The trunk's server, and the sites behind Flower's grid. No process of either belongs to the run.

    Attributes:
        trunk: The trunk.
        name: Name of the run at the trunk.
        plan: Threads of the clients. A site may set its own.
        notes: Lines for the reader on where the parties run.
    """

    def __init__(self, config: Config, plan: Plan, grid: Grid) -> None:
        """Begins the run at the trunk's server.

        Args:
            config: Configuration of the run.
            plan: Threads of the clients.
            grid: Flower's connection to the sites.
        """
        self.config = config
        self.plan = plan
        self.notes = [f"trunk at {config.trunk.server}; each client at a site of its own"]
        self._grid = grid
        self._place = ServerPlace(config)
        self.name, self.trunk = self._place.begin()

    def renew(self) -> None:
        """Begins the run again at the trunk's server."""
        self.trunk.kill()
        self.name, self.trunk = self._place.begin()

    def weigh(self) -> Config:
        """Returns the settings as they are: a trunk at a server has no replicas."""
        return self.config

    def play(self, federation: Federation) -> None:
        """Runs a federation to its end."""
        timeout = self.config.timeout
        stalls = StallWatch(timeout, lambda: self.trunk.status().traffic, _leave_alone)
        clients = FlowerClients(self._grid, federation.stop, self.config.clients, stalls, timeout, away_seconds=timeout)
        run_in_thread(federation, lambda: federation.run(clients), _leave_alone)


def _leave_alone() -> None:
    """Kills nothing: the processes of sites are the sites'."""


def opens(grid: Grid) -> Open:
    """Returns the function that starts the engine for a run.

    Args:
        grid: Flower's connection to the sites.
    """

    @contextlib.contextmanager
    def running(config: Config, plan: Plan, objects: Objects = NOTHING) -> Iterator[SitesSession]:
        session = SitesSession(config, plan, grid)
        try:
            yield session
        finally:
            bounded(session.trunk.kill)

    return running
