"""Early stopping: when a run ends before its last round, and which of its rounds is the best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class EarlyStopping:
    """Compares the held-out losses of the rounds.

    The loss before the first round is not compared.

    Attributes:
        patience: Rounds in a row without an improvement after which a run stops; 0 for a run that does not.
        min_delta: Least difference, in nats a token, by which a loss must be lower to count as an improvement.
        last: Number of the last round.
        best: Round with the lowest loss, the first of several; 0 before the first measured round.
        lowest: Loss of that round.
        waited: Rounds in a row without an improvement. Rounds that left the model as it was do not count.
        mark: Loss of the last round that counted as an improvement.

    Example:
        >>> stopping = EarlyStopping(patience=2)
        >>> for round, loss in enumerate([3.2, 3.0, 3.1, 3.3], start=1):
        ...     stopping.note(round, loss)
        >>> stopping.is_over, stopping.best
        (True, 2)
    """

    patience: int = 0
    min_delta: float = 0.0
    last: int = 0
    best: int = 0
    lowest: float = math.inf
    waited: int = 0
    mark: float = math.inf

    def note(self, round: int, loss: float, changed: bool = True) -> None:
        """Takes the held-out loss of a round.

        Args:
            round: Number of the round.
            loss: Held-out loss; NaN and infinity are no improvement.
            changed: False if the model is as it was after the round before. Its loss then says nothing about
                training, and the round does not count for patience.
        """
        self.last = round
        # The first measured round is the best so far, even with a loss of NaN: a run must have some result.
        if loss < self.lowest or not self.best:
            self.best = round
            self.lowest = loss if math.isfinite(loss) else math.inf

        if not changed:
            return
        if loss < self.mark - self.min_delta:
            self.mark = loss
            self.waited = 0
        else:
            self.waited += 1

    def skip(self, round: int) -> None:
        """Takes a round in which nobody measured; the round does not count for patience.

        Args:
            round: Number of the round.
        """
        self.last = round

    @property
    def is_over(self) -> bool:
        """True once patience has run out."""
        return 0 < self.patience <= self.waited

    @property
    def is_best(self) -> bool:
        """True if no round was better than the last one."""
        return self.best == self.last

    @property
    def reason(self) -> str:
        """Reason for the end of the run, for its summary."""
        if not self.is_over:
            return "all rounds are done"
        by = f" by more than {self.min_delta:g}" if self.min_delta else ""
        return f"{self.waited} rounds in a row have not bettered the held-out loss{by}"

    def document(self) -> dict[str, Any]:
        """Returns the state as plain values for a checkpoint, without the two settings."""
        state = asdict(self)
        # A resumed run may have other values, and takes both from its settings.
        del state["patience"], state["min_delta"]
        # JSON has no infinity.
        return {name: value if math.isfinite(value) else None for name, value in state.items()}

    def go_on(self, document: Mapping[str, Any]) -> None:
        """Takes over the state of a checkpoint, as `document` returned it."""
        for name, value in document.items():
            setattr(self, name, math.inf if value is None else value)
