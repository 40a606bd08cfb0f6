"""When a run ends before its last round, and which of its rounds is the best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Course:
    """How the held-out loss has gone, round by round.

    Rounds of training are compared with each other; the loss before the first one is not among them.

    Attributes:
        patience: Rounds in a row without a better loss after which a run stops; 0: it does not.
        min_delta: By how much a loss must be lower to be better, in nats a token.
        last: The last round.
        best: The round with the lowest loss, the first of several; 0 before there is one.
        lowest: Its loss.
        waited: Rounds in a row without a better loss, of those that changed the model.
        mark: The loss that is to be bettered: that of the last round that did.
    """

    patience: int = 0
    min_delta: float = 0.0
    last: int = 0
    best: int = 0
    lowest: float = math.inf
    waited: int = 0
    mark: float = math.inf

    def note(self, round: int, loss: float, changed: bool = True) -> None:
        """Takes a round's held-out loss.

        Args:
            round: The round.
            loss: Its held-out loss; NaN or infinity is no improvement.
            changed: The model differs from that of the round before. Otherwise the loss says nothing about training,
                and the round does not count for patience.
        """
        self.last = round
        if loss < self.lowest or not self.best:
            self.best, self.lowest = round, loss if math.isfinite(loss) else math.inf
        if not changed:
            return
        if loss < self.mark - self.min_delta:
            self.mark, self.waited = loss, 0
        else:
            self.waited += 1

    @property
    def is_over(self) -> bool:
        """Whether patience has run out."""
        return 0 < self.patience <= self.waited

    @property
    def is_best(self) -> bool:
        """Whether no round was better than the last."""
        return self.best == self.last

    @property
    def reason(self) -> str:
        """Why a run has ended."""
        if not self.is_over:
            return "all rounds are done"
        by = f" by more than {self.min_delta:g}" if self.min_delta else ""
        return f"{self.waited} rounds in a row have not bettered the held-out loss{by}"

    def document(self) -> dict[str, Any]:
        """As plain values, for a checkpoint; without what is a setting."""
        found = asdict(self)
        del found["patience"], found["min_delta"]
        return {name: value if math.isfinite(value) else None for name, value in found.items()}

    def go_on(self, document: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint."""
        for name, value in document.items():
            setattr(self, name, math.inf if value is None else value)
