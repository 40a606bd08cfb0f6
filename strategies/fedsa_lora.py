"""FedSA-LoRA (2410.01463): A is shared, and every client has a B of its own.

Rule: the clients train both, A <- Abar = sum_i w_i A_i, and each B_i stays with client i, which goes on from it.
Needs: equal ranks, and clients that keep B_i from round to round. Costs: A alone up and down once a round, half of
FedAvg's traffic; the server adds up. There is no single global model: the global B stays what it was at the start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fedsplit.updates import FACTORS, Adapters, ClientUpdate, Traits, average_adapters, counted


class FedSALoRA:
    """The weighted average of A."""

    traits = Traits(personal=frozenset("B"), linear=True, factors=True)

    def init(self, adapters: Adapters) -> Mapping[str, Tensor]:
        """FedSA-LoRA remembers nothing; what is personal is remembered by the clients."""
        return {}

    def aggregate(
        self, state: Mapping[str, Tensor], adapters: Adapters, updates: Sequence[ClientUpdate]
    ) -> tuple[Mapping[str, Tensor], Adapters]:
        """Averages A; the global B is the one from before to the bit.

        Raises:
            ValueError: No client has any example.
        """
        return state, average_adapters(adapters, *counted(updates), FACTORS - self.traits.personal)
