"""FLoRA (2409.05976): the clients' adapters are stacked and folded into the base, and all start afresh.

Rule: with A = [w_1 s_1 A_1; ...; w_N s_N A_N] and B = [B_1 ... B_N], W <- W + B A = W + sum_i w_i s_i B_i A_i; then
every client draws a new A and sets B = 0. Exact, whatever the ranks.
Needs: nothing; ranks may differ. Costs: both factors up; down goes the stack, of rank sum_i r_i at most, to every
client, also to those that did not take part. It is sent with as small an inner dimension as it has rank, for which
the server does a QR and an SVD of the stacked factors a layer. The new factors are drawn from a seed at each client
and are not sent. A fresh start every round costs what the optimiser had found out, which hurts long runs.

The first round starts from the draw of round 1, too: so a client's factors never need to be sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedsplit.seeds import derive_seed
from fedsplit.updates import (
    Adapters,
    Assignment,
    ClientInfo,
    ClientUpdate,
    Traits,
    average_adapters,
    counted,
    fresh_factor,
    mean_change,
)


def _restarted(adapters: Adapters, drawn: int) -> Adapters:
    """The adapters with every A drawn anew and every B zero."""
    factors = {}
    for layer in adapters.complete:
        a, b = adapters.factors(layer)
        factors[layer] = fresh_factor(f"{layer}.lora_A.weight", a.shape, drawn), torch.zeros_like(b)
    return adapters.with_factors(factors)


class FLoRA:
    """Folds the exact mean change into the base, and restarts.

    Args:
        seed: What the new factors are drawn from.
    """

    traits = Traits(factors=True, restarts=True, mixed_ranks=True, folds=True, multiplies=True)

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def _drawn(self, state: Mapping[str, Tensor]) -> int:
        """The seed of the factors that the round to come starts from."""
        return derive_seed(self._seed, "flora", int(state["round"]))

    def init(self, adapters: Adapters) -> Mapping[str, Tensor]:
        """The number of the round to come, from 1.

        Raises:
            ValueError: The adapters have learnt something, which the restart would lose.
        """
        if any(bool(adapters.factors(layer)[1].any()) for layer in adapters.complete):
            raise ValueError("FLoRA starts from B = 0: fold what the adapters have learnt into the base first")
        return {"round": torch.tensor(1)}

    def broadcast(self, state: Mapping[str, Tensor], adapters: Adapters, client: ClientInfo) -> Assignment:
        """The round's draw at the client's rank."""
        drawn = self._drawn(state)
        return Assignment(_restarted(adapters.with_rank(client.rank), drawn), drawn=drawn)

    def aggregate(
        self, state: Mapping[str, Tensor], adapters: Adapters, updates: Sequence[ClientUpdate]
    ) -> tuple[Mapping[str, Tensor], Adapters]:
        """Stacks the changes; what is no factor of a LoRA layer is averaged as by FedAvg.

        Raises:
            ValueError: No client has any example.
        """
        ordered, shares = counted(updates)
        following = {"round": state["round"] + 1}
        averaged = average_adapters(adapters, ordered, shares, frozenset())
        changes = {layer: mean_change(ordered, shares, layer).compressed() for layer in adapters.complete}
        folded = {layer: change.to(torch.float32) for layer, change in changes.items() if change.rank}
        return following, replace(_restarted(averaged, self._drawn(following)), folded=folded)
