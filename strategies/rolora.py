"""RoLoRA (2502.01755): A and B take turns.

Rule: in odd rounds (1, 3, ...) the clients train B with A frozen, and B <- sum_i w_i B_i; in even rounds they train A
with B frozen, and A <- sum_i w_i A_i. As one factor is the same at all clients, the average is exact in each round.
Needs: equal ranks. Costs: one factor up and down a round, half of FedAvg's traffic; the server adds up. Each factor
has half the rounds.

The first round trains B, because B = 0 passes no gradient on to A.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
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


def _trained(state: Mapping[str, Tensor]) -> frozenset[str]:
    """The factor whose turn it is."""
    return frozenset("B" if int(state["round"]) % 2 else "A")


class RoLoRA:
    """The weighted average of one factor in each round."""

    traits = Traits(linear=True, factors=True)

    def init(self, adapters: Adapters) -> Mapping[str, Tensor]:
        """The number of the round to come, from 1."""
        return {"round": torch.tensor(1)}

    def broadcast(self, state: Mapping[str, Tensor], adapters: Adapters, client: ClientInfo) -> Assignment:
        """Every client trains the factor whose turn it is."""
        return Assignment(adapters.with_rank(client.rank), Task(trains=_trained(state)))

    def aggregate(
        self, state: Mapping[str, Tensor], adapters: Adapters, updates: Sequence[ClientUpdate]
    ) -> tuple[Mapping[str, Tensor], Adapters]:
        """Averages the factor whose turn it was; the other is the one from before to the bit.

        Raises:
            ValueError: No client has any example.
        """
        averaged = average_adapters(adapters, *counted(updates), _trained(state))
        return {"round": state["round"] + 1}, averaged
