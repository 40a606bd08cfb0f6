"""FLoRA (2409.05976): stack the clients' adapters, fold the stack into the base weights, and restart.

Rule:
    A = [w_1 s_1 A_1; ...; w_N s_N A_N]
    B = [B_1 ... B_N]
    W <- W + B A = W + sum_i w_i s_i B_i A_i
    then every client draws a new A and sets B = 0
Round 1 starts from a draw of the same kind, so that a client's factors never need to be sent.

Needs: nothing; ranks may differ.
Costs: both factors up. The stack, of rank sum_i r_i at most, goes down to every client, also to clients without an
update. The server sends the stack with the smallest possible inner dimension, by a QR and an SVD of the stacked factors
a layer. The clients draw the new factors from a seed, so no new factor is sent.
Exact for all ranks. A restart every round discards the optimiser's progress, and hurts long runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fedsplit.seeds import derive_seed
from fedsplit.updates import (
    Adapters,
    Assignment,
    ClientInfo,
    ClientUpdate,
    State,
    Traits,
    average_adapters,
    fresh_factor,
    mean_change,
    weighted,
)


def _restarted(adapters: Adapters, seed: int) -> Adapters:
    """Returns the adapters with every A drawn from the seed and every B zero."""
    factors = {}
    for layer in adapters.complete:
        a, b = adapters.factors(layer)
        fresh_a = fresh_factor(f"{layer}.lora_A.weight", a.shape, seed)
        factors[layer] = fresh_a, torch.zeros_like(b)
    return adapters.with_factors(factors)


class FLoRA:
    """Folds the exact mean change into the base weights and restarts the adapters.

    Example:
        >>> from strategies.example import lora, one_round
        >>> start = lora(A=[[1, 0]], B=[[0]])
        >>> clients = [lora(A=[[1, 0]], B=[[2]]), lora(A=[[3, 0]], B=[[4]])]
        >>> result = one_round(FLoRA(), start, clients)
        >>> folded = result.folded["layer"]
        >>> round((folded.up @ folded.down)[0, 0].item(), 3)  # (1 * 2 + 3 * 4) / 2
        7.0
        >>> result.tensors["layer.lora_B.weight"].tolist()
        [[0.0]]
    """

    traits = Traits(factors=True, restarts=True, mixed_ranks=True, folds=True, multiplies=True)

    def __init__(self, seed: int = 0) -> None:
        """Sets the seed of the drawn factors; a run passes the run's seed."""
        self._seed = seed

    def _seed_of_round(self, state: State) -> int:
        """Returns the seed of the factors at the start of the coming round."""
        return derive_seed(self._seed, "flora", int(state["round"]))

    def init(self, adapters: Adapters) -> State:
        """Returns the number of the coming round, from 1.

        Raises:
            ValueError: A factor B is not zero. The restart would lose the change of the adapters.
        """
        for layer in adapters.complete:
            _, b = adapters.factors(layer)
            if bool(b.any()):
                raise ValueError("FLoRA starts from B = 0: fold what the adapters have learnt into the base first")
        return {"round": torch.tensor(1)}

    def broadcast(self, state: State, adapters: Adapters, client: ClientInfo) -> Assignment:
        """Sends the round's draw at the client's rank, as a seed."""
        seed = self._seed_of_round(state)
        drawn = _restarted(adapters.with_rank(client.rank), seed)
        return Assignment(drawn, drawn=seed)  # the run sends the seed in place of the factors

    def aggregate(self, state: State, adapters: Adapters, updates: Sequence[ClientUpdate]) -> tuple[State, Adapters]:
        """Folds the stacked changes and restarts. Tensors that are no LoRA factor are averaged, as in FedAvg.

        Raises:
            ValueError: No client trained on any example.
        """
        updates, weights = weighted(updates)
        # The empty set: no LoRA factor is averaged, since the factors are stacked below.
        averaged = average_adapters(adapters, updates, weights, frozenset())

        folded = {}
        for layer in adapters.complete:
            change = mean_change(updates, weights, layer).compressed()
            if change.rank:
                folded[layer] = change.to(torch.float32)

        next_state = {"round": state["round"] + 1}
        restarted = _restarted(averaged, self._seed_of_round(next_state))
        return next_state, replace(restarted, folded=folded)
