"""Objects that a program hands to a run in place of names in the settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Objects:
    """Strategy, objective and metrics of a run, as objects.

    A strategy lives in the server's process. Objectives, metrics and a strategy's gradient stage work at the clients.
    The engine `local` hands the objects to its clients. Under the engine `ray`, each process loads objectives, metrics
    and stages by name.

    Attributes:
        strategy: Strategy of fedsplit or of Flower; None if the settings name the strategy.
        objective: Function of logits and labels; None if the settings name the objective.
        metrics: Functions of logits and labels, by their names in the settings.

    Example:
        >>> NOTHING.has_stage
        False
    """

    strategy: object = None
    objective: Callable[..., Any] | None = None
    metrics: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    @property
    def has_stage(self) -> bool:
        """True if the strategy has a gradient stage at the clients."""
        return callable(getattr(self.strategy, "stage", None))


NOTHING = Objects()
"""No objects: the settings name strategy, objective and metrics."""
