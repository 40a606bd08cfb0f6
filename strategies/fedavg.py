"""FedAvg (1602.05629), which on LoRA's factors is FedIT (2305.05644).

Rule: A <- sum_i w_i A_i, B <- sum_i w_i B_i, with w_i the client's share.
Needs: equal ranks. Costs: both factors up and down once a round. The average of the factors is not the
average of the products: sum_i w_i s (B_i - Bbar)(A_i - Abar) is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fedsplit.updates import Adapters, ClientUpdate, Traits, average_adapters, counted


class FedAvg:
    """The weighted average of the clients' factors."""

    traits = Traits(linear=True)

    def init(self, adapters: Adapters) -> Mapping[str, Tensor]:
        """FedAvg remembers nothing."""
        return {}

    def aggregate(
        self, state: Mapping[str, Tensor], adapters: Adapters, updates: Sequence[ClientUpdate]
    ) -> tuple[Mapping[str, Tensor], Adapters]:
        """Averages every factor in float64, in the order of the clients, and rounds once.

        Raises:
            ValueError: No client has any example.
        """
        return state, average_adapters(adapters, *counted(updates))
