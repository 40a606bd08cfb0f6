"""The trunk of a run on Ray, as all engines with processes have it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from uuid import uuid4

from fedsplit.engines.planning import Plan
from fedsplit.settings.config import Config
from fedsplit.trunk.actor import start_trunk


class RayHost:
    """A Ray with the trunk's actor.

    Attributes:
        trunk: The trunk.
        name: Name of the trunk's actor; names the run, too.
        plan: Processes, threads and lanes.
        notes: Lines for the reader on where the parties run.
    """

    def __init__(
        self,
        config: Config,
        plan: Plan,
        has_stage: bool,
        place: Callable[[], Mapping[str, Any]] | None = None,
    ) -> None:
        """Starts the trunk's actor, which loads while the caller goes on.

        Args:
            config: Configuration of the run.
            plan: Processes, threads and lanes.
            has_stage: True if the strategy has a gradient stage, which the trunk loads by its name.
            place: Returns the options of the trunk's actor; called for each trunk of the run. None for no resources.
        """
        self.config = config
        self.plan = plan
        self.notes: list[str] = []
        self._has_stage = has_stage
        self._place = place
        self._start()

    def _start(self) -> None:
        plan = self.plan
        self.name = f"trunk-{uuid4()}"
        self.trunk = start_trunk(
            self.config,
            self.name,
            plan.trunk_threads,
            plan.trunk_lanes,
            has_stage=self._has_stage,
            options=self._place() if self._place else None,
            is_reached_from_afar=self.config.ray.address != "local",
        )

    def renew(self) -> None:
        """Kills the trunk's actor, if it is not dead already, and starts another one."""
        self.trunk.kill()
        self._start()
