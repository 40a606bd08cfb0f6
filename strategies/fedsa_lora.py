"""FedSA-LoRA (2410.01463): A is shared, B is personal.

Rule:
    clients train both factors
    A <- sum_i w_i A_i
    each B_i stays with client i, and is the start of the client's next round

Needs: equal ranks; clients that keep B_i from round to round.
Costs: A alone up and down once a round, half of FedAvg's traffic.
No single global model exists: the global B stays at the value of the run's beginning.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedsplit.updates import FACTORS, Adapters, ClientUpdate, State, Traits, average_adapters, weighted

PERSONAL = frozenset("B")


class FedSALoRA:
    """Averages A. Every client keeps a private B.

    Example:
        >>> from strategies.example import lora, one_round
        >>> start = lora(A=[[1, 0]], B=[[0], [0]])
        >>> clients = [lora(A=[[1, 2]], B=[[8], [0]]), lora(A=[[5, 0]], B=[[0], [4]])]
        >>> A, B = one_round(FedSALoRA(), start, clients).factors("layer")
        >>> A.tolist(), B.tolist()
        ([[3.0, 1.0]], [[0.0], [0.0]])
    """

    traits = Traits(factors=True, personal=PERSONAL, linear=True)

    def init(self, adapters: Adapters) -> State:
        """Returns an empty state: each client remembers the private factors."""
        return {}

    def aggregate(self, state: State, adapters: Adapters, updates: Sequence[ClientUpdate]) -> tuple[State, Adapters]:
        """Returns the average of A, and the global B of `adapters` to the bit.

        Raises:
            ValueError: No client trained on any example.
        """
        updates, weights = weighted(updates)
        shared = FACTORS - PERSONAL
        return state, average_adapters(adapters, updates, weights, shared)
