"""The trunk of a run on Ray, as all engines with processes have it, or at a server outside of Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedsplit.engines.planning import Plan
from fedsplit.engines.trunk_places import RunTrunk, place_of
from fedsplit.settings.config import Config
from fedsplit.trunk.actor import ActorSetup
from fedsplit.trunk.ray_trunks import start_trunks


class RayHost:
    """A Ray with the trunk's actor, or with a way to the trunk's server.

    Attributes:
        trunk: The trunk.
        name: Name of the trunk; names the run, too.
        plan: Processes, threads and lanes.
        notes: Lines for the reader on where the parties run.
    """

    def __init__(
        self,
        config: Config,
        plan: Plan,
        has_stage: bool,
        place: Callable[[], Sequence[Mapping[str, Any]]] | None = None,
    ) -> None:
        """Starts the trunk's actor, which loads while the caller goes on.

        Args:
            config: Configuration of the run.
            plan: Processes, threads and lanes.
            has_stage: True if the strategy has a gradient stage, which the trunk loads by its name.
            place: Returns the options of the trunk's actors; called for each start of a trunk. None for no resources.
        """
        self.config = config
        self.plan = plan
        self.notes: list[str] = []
        self._has_stage = has_stage
        self._place = place
        self._trunk_place = place_of(config, self._start)
        self._begin()

    def _begin(self) -> None:
        self.name, self.trunk = self._trunk_place.begin()

    def _start(self, name: str) -> RunTrunk:
        """Starts the trunk's actors."""
        setup = ActorSetup(
            threads=self.plan.trunk_threads,
            workers=self.plan.trunk_lanes,
            has_stage=self._has_stage,
            is_reached_from_afar=self.config.ray.address != "local",
        )
        options = self._place() if self._place else None
        return start_trunks(self.config, name, setup, options)

    def renew(self) -> None:
        """Kills the trunk's actors that are not dead already, and starts others; or begins again at the server."""
        self.trunk.kill()
        self._begin()

    def weigh(self) -> Config:
        """Divides the clients among replicas by speed, if the settings ask for it; see `Session.weigh`."""
        self.config = self.trunk.weigh(self.config)
        return self.config
