"""RoLoRA (2502.01755): rounds alternate between B and A.

Rule:
    odd rounds (1, 3, ...): clients train B, with A frozen; B <- sum_i w_i B_i
    even rounds (2, 4, ...): clients train A, with B frozen; A <- sum_i w_i A_i
The first round trains B, because B = 0 passes no gradient on to A.

Needs: equal ranks.
Costs: one factor up and down a round, half of FedAvg's traffic. Each factor has half the rounds.
Exact: in each round one factor is the same at all clients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

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


def _trained(state: State) -> frozenset[str]:
    """Returns the trained factor of the coming round.

    Example:
        >>> _trained({"round": torch.tensor(1)}), _trained({"round": torch.tensor(2)})
        (frozenset({'B'}), frozenset({'A'}))
    """
    is_odd = int(state["round"]) % 2 == 1
    return frozenset("B" if is_odd else "A")


class RoLoRA:
    """Averages one factor a round: B in odd rounds, A in even rounds.

    Example:
        >>> from strategies.example import lora, one_round
        >>> start = lora(A=[[1, 2]], B=[[0], [0]])
        >>> clients = [lora(A=[[1, 2]], B=[[8], [0]]), lora(A=[[1, 2]], B=[[0], [4]])]
        >>> A, B = one_round(RoLoRA(), start, clients).factors("layer")  # round 1 trains B
        >>> A.tolist(), B.tolist()
        ([[1.0, 2.0]], [[4.0], [2.0]])
    """

    traits = Traits(factors=True, linear=True)

    def init(self, adapters: Adapters) -> State:
        """Returns the number of the coming round, from 1."""
        return {"round": torch.tensor(1)}

    def broadcast(self, state: State, adapters: Adapters, client: ClientInfo) -> Assignment:
        """Asks every client to train the round's factor alone."""
        task = Task(trains=_trained(state))
        return Assignment(adapters.with_rank(client.rank), task)

    def aggregate(self, state: State, adapters: Adapters, updates: Sequence[ClientUpdate]) -> tuple[State, Adapters]:
        """Returns the average of the round's factor, and the frozen factor of `adapters` to the bit.

        Raises:
            ValueError: No client trained on any example.
        """
        updates, weights = weighted(updates)
        # The frozen factor is equal at all clients, but an average of equal numbers need not give the same bits.
        averaged = average_adapters(adapters, updates, weights, _trained(state))
        return {"round": state["round"] + 1}, averaged
