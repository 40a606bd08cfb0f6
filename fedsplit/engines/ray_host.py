"""The trunk of a run on Ray, as all engines with processes have it."""

from __future__ import annotations

import os
import time

from fedsplit.engines.planning import Plan
from fedsplit.settings.config import Config
from fedsplit.trunk.actor import start_trunk


class RayHost:
    """A Ray with the trunk's actor.

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
        self.config = config
        self.plan = plan
        self._has_stage = has_stage
        self._start()

    def _start(self) -> None:
        plan = self.plan
        self.name = f"trunk-{os.getpid()}-{time.time_ns()}"
        self.trunk = start_trunk(
            self.config, self.name, plan.trunk_threads, plan.trunk_lanes, has_stage=self._has_stage
        )

    def renew(self) -> None:
        """Kills the trunk's actor, if it is not dead already, and starts another one."""
        self.trunk.kill()
        self._start()
