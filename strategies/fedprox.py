"""FedProx (1812.06127): FedAvg whose clients are held near what they started from.

Rule: client i minimises L_i(theta) + mu / 2 * ||theta - theta_t||^2 over the factors that it trains;
A <- sum_i w_i A_i, B <- sum_i w_i B_i.
Needs: equal ranks; clients that add the term. Costs: FedAvg's. With mu = 0 it is FedAvg. The term pulls at the
factors, not at their product.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from fedsplit.updates import Adapters, Assignment, ClientInfo, ClientUpdate, Task, Traits, average_adapters, counted


class FedProx:
    """The weighted average of factors that were trained with a proximal term."""

    traits = Traits(linear=True)

    def __init__(self, mu: float = 0.01) -> None:
        """Sets the pull.

        Args:
            mu: How strongly a client is held back; 0 is FedAvg.
        """
        if not 0 <= mu < math.inf:
            raise ValueError(f"mu is {mu}; it must be 0 or more")
        self.mu = mu

    def init(self, adapters: Adapters) -> Mapping[str, Tensor]:
        """FedProx remembers nothing."""
        return {}

    def broadcast(self, state: Mapping[str, Tensor], adapters: Adapters, client: ClientInfo) -> Assignment:
        """The adapters, and the task to stay near them."""
        return Assignment(adapters.with_rank(client.rank), Task(proximal=self.mu))

    def aggregate(
        self, state: Mapping[str, Tensor], adapters: Adapters, updates: Sequence[ClientUpdate]
    ) -> tuple[Mapping[str, Tensor], Adapters]:
        """Averages as FedAvg does.

        Raises:
            ValueError: No client has any example.
        """
        return state, average_adapters(adapters, *counted(updates))
