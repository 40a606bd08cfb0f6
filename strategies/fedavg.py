"""FedAvg (1602.05629): the weighted average. On the factors of LoRA this is FedIT (2305.05644).

Rule:
    A <- sum_i w_i A_i
    B <- sum_i w_i B_i
    w_i is the weight of client i: the client's share of the training examples, or the value in `--weights`.

Needs: equal ranks.
Costs: both factors up and down once a round.
Not exact: the average of the factors is not the average of the products. The term
sum_i w_i s (B_i - Bbar)(A_i - Abar) is lost, with Abar and Bbar the averages.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedsplit.updates import Adapters, ClientUpdate, State, Traits, average_adapters, weighted


class FedAvg:
    """Averages every tensor, each client weighted by its examples.

    Example:
        >>> from strategies.example import lora, one_round
        >>> start = lora(A=[[1, 0]], B=[[0], [0]])
        >>> ann = lora(A=[[1, 2]], B=[[8], [0]])
        >>> bob = lora(A=[[5, -2]], B=[[0], [4]])
        >>> A, B = one_round(FedAvg(), start, [ann, bob], examples=[1, 3]).factors("layer")
        >>> A.tolist(), B.tolist()
        ([[4.0, -1.0]], [[2.0], [3.0]])
    """

    traits = Traits(linear=True)

    def init(self, adapters: Adapters) -> State:
        """Returns an empty state: FedAvg remembers nothing."""
        return {}

    def aggregate(self, state: State, adapters: Adapters, updates: Sequence[ClientUpdate]) -> tuple[State, Adapters]:
        """Returns the weighted average of the clients' adapters.

        The sum runs in float64 and in the order of the clients, and is rounded once. So the order of the answers
        changes no bit.

        Raises:
            ValueError: No client trained on any example.
        """
        updates, weights = weighted(updates)
        return state, average_adapters(adapters, updates, weights)
