"""Objects that a program hands to a run in place of names in the settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Objects:
    """Strategy, objective and metrics of a run, as objects.

    A strategy lives in the server's process. Objectives, metrics and a strategy's gradient stage work at the clients:
    the engine `local` hands the objects on, and the engine `ray` has each process load them by name.

    Attributes:
        strategy: Strategy of ours or of Flower's; None: the one that the settings name.
        objective: Function of logits and labels; None: the one that the settings name.
        metrics: Functions of logits and labels, by their names in the settings.

    Example:
        >>> NOTHING.has_stage
        False
    """

    strategy: Any = None
    objective: Any = None
    metrics: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_stage(self) -> bool:
        """True if the strategy has a gradient stage at the clients."""
        return callable(getattr(self.strategy, "stage", None))


NOTHING = Objects()
"""No object: everything is made by its name."""
