"""The aggregation of the clients' adapters."""

from __future__ import annotations

from collections.abc import Sequence

from fedsplit.updates import Adapters, ClientUpdate, State
from strategies.fedavg import FedAvg


class Cautious:
    """Moves a part of the way to the clients' average.

    Example:
        >>> from strategies.example import lora, one_round
        >>> start = lora(A=[[1, 0]], B=[[0]])
        >>> ann = lora(A=[[1, 0]], B=[[2]])
        >>> bob = lora(A=[[1, 0]], B=[[6]])
        >>> A, B = one_round(Cautious(rate=0.5), start, [ann, bob]).factors("layer")
        >>> B.tolist()  # half the way from 0 to the average, 4
        [[2.0]]
    """

    def __init__(self, rate: float = 0.5) -> None:
        """Takes the share of the way, above 0 and up to 1."""
        if not 0 < rate <= 1:
            raise ValueError("rate must be above 0, and 1 at most")
        self.rate = rate

    def init(self, adapters: Adapters) -> State:
        """Returns the state before the first round: none."""
        return {}

    def aggregate(self, state: State, adapters: Adapters, updates: Sequence[ClientUpdate]) -> tuple[State, Adapters]:
        """Returns the state and the adapters of the next round.

        Args:
            state: The state after the last round.
            adapters: The adapters before the round.
            updates: The clients' adapters after the round.
        """
        _, average = FedAvg().aggregate({}, adapters, updates)
        moved = {name: old + self.rate * (average.tensors[name] - old) for name, old in adapters.tensors.items()}
        return state, adapters.with_tensors(moved)
