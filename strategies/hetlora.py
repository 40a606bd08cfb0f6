"""HetLoRA (2401.06432): average zero-padded factors, weighted by the size of each client's change.

Rule:
    pad every A_i and B_i with zeros to the largest rank r
    A <- sum_i p_i A_i
    B <- sum_i p_i B_i
    p_i = ||Delta W_i|| / sum_j ||Delta W_j||, with Delta W_i = s_i B_i A_i and the Frobenius norm
    a client of rank r_j starts from the first r_j rows of A and columns of B
The norm covers all layers of a client together (the paper writes one Delta W_i a client). The numbers of examples
do not enter, except that p_i = w_i if all norms are zero.

Self-pruning, with `decay` (the paper's lambda) above 0: the tail of a client's factors are the rows beyond the first
floor(gamma r_i). The client adds lambda ||A_tail|| ||B_tail||, summed over the layers, to the loss. If the sum shrank
in the client's training, the server prunes the tail: the round's average ignores the tail, and the client's rank is
max(1, floor(gamma r_i)) from the next round on.

Needs: nothing; ranks may differ.
Costs: both factors up and down once a round, each at the client's rank.
Not exact: averaging factors is not averaging products, as with FedAvg, and zeros dilute rows that few clients hold.

Beyond the paper: padding and cutting keep s B A, though s depends on the rank; and rows of A without a client in the
round keep the earlier values (see `strategies.mixed_ranks`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from fedsplit.updates import Adapters, Assignment, ClientInfo, ClientUpdate, State, Task, Traits, sure_rank, weighted
from strategies.mixed_ranks import average_others, padded_average, rank_of


def tail_norm(adapters: Adapters, gamma: float) -> float:
    """Returns ||A_tail|| * ||B_tail||, summed over the layers.

    Args:
        adapters: A client's adapters.
        gamma: Share of the rank before the tail.

    Example:
        >>> from strategies.example import lora
        >>> tail_norm(lora(A=[[1], [2]], B=[[1, 3]]), gamma=0.5)  # the second row times the second column
        6.0
    """
    norms = []
    for layer in adapters.complete:
        a, b = adapters.factors(layer)
        kept = sure_rank(a.shape[0], gamma)
        norm_a = a[kept:].double().norm()
        norm_b = b[:, kept:].double().norm()
        norms.append(float(norm_a * norm_b))
    return math.fsum(norms)


def change_norm(adapters: Adapters) -> float:
    """Returns ||Delta W_i||: the Frobenius norm of a client's change over all layers.

    Example:
        >>> from strategies.example import lora
        >>> round(change_norm(lora(A=[[3, 4]], B=[[2]])), 6)
        10.0
    """
    norms = [adapters.change(layer).norm() for layer in adapters.complete]
    return math.hypot(*norms)


class HetLoRA:
    """Averages zero-padded factors, weighted by the norm of each client's change.

    Example:
        >>> from strategies.example import lora, one_round
        >>> start = lora(A=[[1]], B=[[0]])
        >>> clients = [lora(A=[[1]], B=[[1]]), lora(A=[[1]], B=[[3]])]  # norms 1 and 3, so p = 1/4 and 3/4
        >>> _, B = one_round(HetLoRA(), start, clients).factors("layer")
        >>> B.tolist()
        [[2.5]]
    """

    traits = Traits(factors=True, mixed_ranks=True, multiplies=True)

    def __init__(self, gamma: float = 0.99, decay: float = 0.0) -> None:
        """Sets up self-pruning.

        Args:
            gamma: Share of the rank that every client keeps.
            decay: Weight of the tail's norm in a client's loss; 0 for no pruning.

        Raises:
            ValueError: gamma is not above 0 and at most 1, or decay is negative.
        """
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma must be above 0 and at most 1, not {gamma}")
        if not 0 <= decay < math.inf:
            raise ValueError(f"decay must be 0 or above, not {decay}")
        self._gamma = gamma
        self._decay = decay

    def init(self, adapters: Adapters) -> State:
        """Returns an empty state: no client has been pruned."""
        return {}

    def broadcast(self, state: State, adapters: Adapters, client: ClientInfo) -> Assignment:
        """Sends the first rows of A and columns of B, up to the client's rank, or to the rank after pruning."""
        rank = client.rank
        pruned_rank = state.get(f"rank.{client.client}")
        if pruned_rank is not None:
            rank = min(rank, int(pruned_rank))
        task = Task()
        if self._decay:
            task = Task(tail=self._gamma, decay=self._decay)
        return Assignment(adapters.with_rank(rank), task)

    def aggregate(self, state: State, adapters: Adapters, updates: Sequence[ClientUpdate]) -> tuple[State, Adapters]:
        """Prunes clients with a shrunken tail, pads all factors with zeros and averages.

        Raises:
            ValueError: No client trained on any example.
        """
        updates, weights = weighted(updates)

        new_state = dict(state)
        pruned = []
        for update in updates:
            kept = self._prune(adapters, update)
            if kept is not update:
                new_rank = rank_of(kept.adapters)
                new_state[f"rank.{update.client}"] = torch.tensor(new_rank)
            pruned.append(kept)

        # p_i, the share of client i in the sum of all norms; if no client changed anything, the weights w_i.
        norms = [change_norm(update.adapters) for update in pruned]
        total = math.fsum(norms)
        p: Sequence[float] = weights
        if total > 0:
            p = [norm / total for norm in norms]
        factors = padded_average(adapters, pruned, p)
        others = average_others(adapters, pruned, weights)
        return new_state, others.with_factors(factors)

    def _prune(self, adapters: Adapters, update: ClientUpdate) -> ClientUpdate:
        """Returns the update without the tail if the tail shrank, otherwise the update itself."""
        rank = rank_of(update.adapters)
        given = update.given or adapters.with_rank(rank)
        before = tail_norm(given, self._gamma)
        after = tail_norm(update.adapters, self._gamma)
        has_shrunk = after < before
        if not self._decay or not has_shrunk:
            return update
        new_rank = sure_rank(rank, self._gamma)
        return replace(update, adapters=update.adapters.with_rank(new_rank))
