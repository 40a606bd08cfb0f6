"""FFA-LoRA (2403.12313): A is frozen, B is trained.

Rule:
    A stays A_0, the draw at the beginning of the run
    B <- Bbar = sum_i w_i B_i

Needs: equal ranks.
Costs: B alone up and down once a round, half of FedAvg's traffic.
Exact: all clients share A_0, so sum_i w_i s B_i A_0 = s Bbar A_0. The price is expressiveness: a layer sees its input
through A_0 only. Under differential privacy, noise on B is not multiplied by noise on A.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedsplit.updates import (
    Adapters,
    Assignment,
    ClientInfo,
    ClientUpdate,
    State,
    Task,
    Traits,
    average_adapters,
    weighted,
)

TRAINED = frozenset("B")  # B is zero at the beginning: with B frozen instead, A would get no gradient


class FFALoRA:
    """Averages B, and keeps the drawn A.

    Example:
        >>> from strategies.example import lora, one_round
        >>> start = lora(A=[[1, 2]], B=[[0], [0]])
        >>> clients = [lora(A=[[1, 2]], B=[[8], [0]]), lora(A=[[1, 2]], B=[[0], [4]])]
        >>> A, B = one_round(FFALoRA(), start, clients).factors("layer")
        >>> A.tolist(), B.tolist()
        ([[1.0, 2.0]], [[4.0], [2.0]])
    """

    traits = Traits(factors=True, linear=True)

    def init(self, adapters: Adapters) -> State:
        """Returns an empty state: FFA-LoRA remembers nothing."""
        return {}

    def broadcast(self, state: State, adapters: Adapters, client: ClientInfo) -> Assignment:
        """Asks every client to train B alone."""
        task = Task(trains=TRAINED)
        return Assignment(adapters.with_rank(client.rank), task)

    def aggregate(self, state: State, adapters: Adapters, updates: Sequence[ClientUpdate]) -> tuple[State, Adapters]:
        """Returns the average of B, and the A of `adapters` to the bit, whatever the updates hold.

        Raises:
            ValueError: No client trained on any example.
        """
        updates, weights = weighted(updates)
        return state, average_adapters(adapters, updates, weights, TRAINED)
