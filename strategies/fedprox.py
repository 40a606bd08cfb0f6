"""FedProx (1812.06127): FedAvg, with clients held near the adapters of the round's start.

Rule:
    client i minimises L_i(theta) + mu / 2 * ||theta - theta_t||^2 over the trained factors
    A <- sum_i w_i A_i
    B <- sum_i w_i B_i

Needs: equal ranks; clients that add the proximal term.
Costs: as FedAvg. With mu = 0, FedProx is FedAvg. The term acts on the factors, not on the product.
"""

from __future__ import annotations

import math
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


class FedProx:
    """Averages the factors of clients that train with a proximal term.

    Example:
        >>> from fedsplit.updates import ClientInfo
        >>> from strategies.example import lora
        >>> strategy = FedProx(mu=0.1)
        >>> adapters = lora(A=[[1, 0]], B=[[0], [0]])
        >>> strategy.broadcast({}, adapters, ClientInfo(client=0, rank=1)).task.proximal
        0.1
    """

    traits = Traits(linear=True)

    def __init__(self, mu: float = 0.01) -> None:
        """Sets the strength of the proximal term.

        Args:
            mu: Coefficient of the term; 0 is FedAvg.

        Raises:
            ValueError: mu is negative or not finite.
        """
        if not 0 <= mu < math.inf:  # a negative mu would push clients away without end
            raise ValueError(f"mu is {mu}; it must be 0 or more")
        self.mu = mu

    def init(self, adapters: Adapters) -> State:
        """Returns an empty state: FedProx remembers nothing."""
        return {}

    def broadcast(self, state: State, adapters: Adapters, client: ClientInfo) -> Assignment:
        """Sends the adapters, and asks the client to add the proximal term to the loss."""
        task = Task(proximal=self.mu)
        return Assignment(adapters.with_rank(client.rank), task)

    def aggregate(self, state: State, adapters: Adapters, updates: Sequence[ClientUpdate]) -> tuple[State, Adapters]:
        """Returns the weighted average, as FedAvg does.

        Raises:
            ValueError: No client trained on any example.
        """
        updates, weights = weighted(updates)
        return state, average_adapters(adapters, updates, weights)
