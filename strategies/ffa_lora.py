"""FFA-LoRA (2403.12313): A is frozen, and only B is learnt.

Rule: A stays A_0, B <- Bbar = sum_i w_i B_i. As all clients share A_0, sum_i w_i s B_i A_0 = s Bbar A_0: the
average is exact.
Needs: equal ranks. Costs: B alone up and down once a round, half of FedAvg's traffic; the server adds up. A layer's
input is only ever seen through A_0, so less can be learnt than with both factors. Under differential privacy, noise
on B is not multiplied by noise on A.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fedsplit.updates import (
    Adapters,
    Assignment,
    ClientInfo,
    ClientUpdate,
    Task,
    Traits,
    average_adapters,
    counted,
)

TRAINED = frozenset("B")


class FFALoRA:
    """The weighted average of B, with A as it was drawn."""

    traits = Traits(linear=True, factors=True)

    def init(self, adapters: Adapters) -> Mapping[str, Tensor]:
        """FFA-LoRA remembers nothing."""
        return {}

    def broadcast(self, state: Mapping[str, Tensor], adapters: Adapters, client: ClientInfo) -> Assignment:
        """Every client trains B, and B only."""
        return Assignment(adapters.with_rank(client.rank), Task(trains=TRAINED))

    def aggregate(
        self, state: Mapping[str, Tensor], adapters: Adapters, updates: Sequence[ClientUpdate]
    ) -> tuple[Mapping[str, Tensor], Adapters]:
        """Averages B; A is the one from before to the bit, whatever the updates hold.

        Raises:
            ValueError: No client has any example.
        """
        return state, average_adapters(adapters, *counted(updates), TRAINED)
