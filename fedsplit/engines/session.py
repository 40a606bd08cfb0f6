"""The port to an engine: starts the parties of a run, and plays a federation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Protocol

from fedsplit.engines.planning import Plan
from fedsplit.federation.federation import Federation
from fedsplit.federation.parties import TrunkHost
from fedsplit.objects import Objects
from fedsplit.settings.config import Config


class Session(TrunkHost, Protocol):
    """An engine that has started, with the trunk of the run.

    Attributes:
        plan: Processes, threads and lanes as they have come to be.
        notes: Lines for the reader on where the parties run.
    """

    plan: Plan
    notes: list[str]

    def weigh(self) -> Config:
        """Measures the speed of replicas of the trunk if the settings ask for it, and divides the clients accordingly.

        Returns:
            The settings of the run, with the weights of the replicas.
        """
        ...

    def play(self, federation: Federation) -> None:
        """Runs a federation to its end.

        Raises:
            Exception: Whatever ended the federation.
        """
        ...


Open = Callable[[Config, Plan, Objects], contextlib.AbstractContextManager[Session]]
"""Starts an engine for a run, for as long as the context lasts."""


def engine_named(name: str) -> Open:
    """Returns the engine of a name.

    Args:
        name: "ray", "local" or "flower".
    """
    # Imported here: two of them import Ray and Flower, which the third one does without.
    if name == "local":
        from fedsplit.engines import in_process

        return in_process.running
    if name == "flower":
        from fedsplit.engines import flower_engine

        return flower_engine.running
    from fedsplit.engines import ray_engine

    return ray_engine.running
