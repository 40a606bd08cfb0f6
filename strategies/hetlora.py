"""HetLoRA (2401.06432).

Rule: fill every A_i and B_i with zeros to the largest rank r; A <- sum_i p_i A_i, B <- sum_i p_i B_i with
p_i = ||Delta W_i|| / sum_j ||Delta W_j||, the Frobenius norms of Delta W_i = s_i B_i A_i; a client of rank r_j is
given the first r_j rows of A and columns of B. The norm is taken once a client, over all layers together (the paper
writes one Delta W_i a client), and the numbers of examples do not enter. Where all norms are zero, p_i = w_i.
Self-pruning, with `decay` (the paper's lambda) above 0: beyond the first floor(gamma r_i) rows a client's factors are
its tail, and lambda ||A_tail|| ||B_tail||, summed over the layers, is added to its loss. A client whose tail, by this
measure, became smaller in its training loses it: it is left out of this round's average, as if the client had cut it
off before sending, and the client's rank is max(1, floor(gamma r_i)) from then on.
Needs: nothing; ranks may differ. Costs: both factors up and down once a round, each at the client's rank. Averaging
factors is not averaging products, as with FedAvg, and zeros dilute the rows that few clients hold.

Beside the paper: filling and cutting keep s B A, whose s depends on the rank; and rows of A that no client of a round
held stay as they were (see `strategies.mixed_ranks`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedsplit.updates import Adapters, Assignment, ClientInfo, ClientUpdate, Task, Traits, counted, sure_rank
from strategies.mixed_ranks import average_others, padded_average, rank_of


def tail_norm(adapters: Adapters, gamma: float) -> float:
    """||A_tail|| * ||B_tail||, summed over the layers."""
    norms = []
    for layer in adapters.complete:
        a, b = adapters.factors(layer)
        sure = sure_rank(a.shape[0], gamma)
        norms.append(float(a[sure:].double().norm() * b[:, sure:].double().norm()))
    return math.fsum(norms)


def change_norm(adapters: Adapters) -> float:
    """The Frobenius norm of what all layers of a client add to the weights."""
    return math.hypot(*(adapters.change(layer).norm() for layer in adapters.complete))


class HetLoRA:
    """The average of zero-padded factors, weighted by the size of each client's change."""

    traits = Traits(mixed_ranks=True, factors=True)

    def __init__(self, gamma: float = 0.99, decay: float = 0.0) -> None:
        """Sets up self-pruning.

        Args:
            gamma: The share of its rank that a client is sure to keep.
            decay: What the norm of the tail weighs in a client's loss; 0 means that nothing is ever pruned.

        Raises:
            ValueError: gamma is not above 0 and at most 1, or decay is negative.
        """
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma must be above 0 and at most 1, not {gamma}")
        if not 0 <= decay < math.inf:
            raise ValueError(f"decay must be 0 or above, not {decay}")
        self._gamma, self._decay = gamma, decay

    def init(self, adapters: Adapters) -> Mapping[str, Tensor]:
        """Nobody has been pruned."""
        return {}

    def broadcast(self, state: Mapping[str, Tensor], adapters: Adapters, client: ClientInfo) -> Assignment:
        """The first rows of A and columns of B, as many as the client was assigned or has kept."""
        kept = state.get(f"rank.{client.client}")
        rank = client.rank if kept is None else min(client.rank, int(kept))
        task = Task(tail=self._gamma, decay=self._decay) if self._decay else Task()
        return Assignment(adapters.with_rank(rank), task)

    def aggregate(
        self, state: Mapping[str, Tensor], adapters: Adapters, updates: Sequence[ClientUpdate]
    ) -> tuple[Mapping[str, Tensor], Adapters]:
        """Prunes whose tail has shrunk, fills with zeros and averages.

        Raises:
            ValueError: No client has any example.
        """
        updates, shares = counted(updates)
        pruned = [self._prune(adapters, update) for update in updates]
        ranks = {
            f"rank.{new.client}": torch.tensor(rank_of(new.adapters))
            for old, new in zip(updates, pruned, strict=True)
            if new is not old
        }
        norms = [change_norm(update.adapters) for update in pruned]
        whole = math.fsum(norms)
        weights = [norm / whole for norm in norms] if whole > 0 else shares
        result = average_others(adapters, pruned, shares).with_factors(padded_average(adapters, pruned, weights))
        return {**state, **ranks}, result

    def _prune(self, adapters: Adapters, update: ClientUpdate) -> ClientUpdate:
        """The update without its tail if that has shrunk; otherwise the update itself."""
        rank = rank_of(update.adapters)
        given = update.given or adapters.with_rank(rank)
        if not self._decay or tail_norm(update.adapters, self._gamma) >= tail_norm(given, self._gamma):
            return update
        return replace(update, adapters=update.adapters.with_rank(sure_rank(rank, self._gamma)))
