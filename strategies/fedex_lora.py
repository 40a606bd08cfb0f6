"""FedEx-LoRA (2410.09432): FedAvg, with the error of the average folded into the base weights.

Rule:
    A <- Abar
    B <- Bbar
    W <- W + Delta W* - s Bbar Abar, with Delta W* = sum_i w_i s_i B_i A_i
For equal ranks the folded residual is sum_i w_i s (B_i - Bbar)(A_i - Abar), of rank (N - 1) r at most. Clients of
smaller ranks are first padded with zeros to the largest rank r, which keeps s_i B_i A_i.

Needs: nothing; ranks may differ.
Costs: both factors up and down. The factors of the residual go down to every client, also to clients without an update.
The server makes a QR and an SVD of stacked factors of inner dimension sum_i r_i + r a layer.
Exact, and the factors continue from round to round. With `rank` > 0 the server sends the residual's best fit of rank
`rank` instead (Eckart and Young). The best fit is cheaper and not exact.

With different ranks, a client of rank r_i starts from the first r_i rows of A and columns of B, and returns only these.
Exact is then the mean of the returned factors, with zeros for missing rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedsplit.lowrank import LowRank, balanced
from fedsplit.updates import Adapters, ClientUpdate, State, Traits, average_adapters, mean_change, weighted

ROUNDING = 2.0**-24
"""Relative error of rounding to float32, the type of the averages on the way to clients."""


def _needed(singular: Tensor, tolerance: float) -> int:
    """Returns the smallest number of singular values to keep, so that the rest has a norm of `tolerance` at most.

    Example:
        >>> _needed(torch.tensor([5.0, 4.0, 3.0]), tolerance=4.0)
        2
    """
    rising = singular.square().flip(0)  # from the smallest on, which a large sum would swallow
    tails = rising.cumsum(0).flip(0).sqrt()  # norm of each value and all smaller values
    return int((tails > tolerance).sum())


class FedExLoRA:
    """Averages the factors and folds the residual, so that the average is exact.

    Example:
        >>> from strategies.example import lora, one_round
        >>> start = lora(A=[[1, 0]], B=[[0]])
        >>> clients = [lora(A=[[1, 0]], B=[[2]]), lora(A=[[3, 0]], B=[[4]])]
        >>> result = one_round(FedExLoRA(), start, clients)
        >>> A, B = result.factors("layer")
        >>> folded = result.folded["layer"]
        >>> (B @ A).tolist(), round((folded.up @ folded.down)[0, 0].item(), 3)  # 6 + 1 = (1 * 2 + 3 * 4) / 2
        ([[6.0, 0.0]], 1.0)
    """

    traits = Traits(factors=True, mixed_ranks=True, folds=True, multiplies=True)

    def __init__(self, rank: int = 0) -> None:
        """Sets the largest rank of the residual.

        Args:
            rank: Largest rank; 0 for no limit.

        Raises:
            ValueError: rank is negative, or no whole number.
        """
        if not isinstance(rank, int) or rank < 0:
            raise ValueError(f"rank is {rank!r}; allowed: a whole number, 0 for an exact residual")
        self._rank = rank

    def init(self, adapters: Adapters) -> State:
        """Returns an empty state: FedEx-LoRA remembers nothing."""
        return {}

    def aggregate(self, state: State, adapters: Adapters, updates: Sequence[ClientUpdate]) -> tuple[State, Adapters]:
        """Averages every factor at the largest rank and folds the residual of the average.

        Raises:
            ValueError: No client trained on any example.
        """
        updates, weights = weighted(updates)
        largest = adapters.largest_rank
        padded = []
        for update in updates:
            at_largest = update.adapters.with_rank(largest)
            padded.append(replace(update, adapters=at_largest))
        averaged = average_adapters(adapters, padded, weights)

        folded = {}
        for layer in adapters.complete:
            mean = mean_change(updates, weights, layer)
            residual = self._residual(mean, averaged, layer, len(updates))
            if residual.rank:  # equal clients leave no residual
                folded[layer] = residual.to(torch.float32)
        return state, replace(averaged, folded=folded)

    def _residual(self, mean: LowRank, averaged: Adapters, layer: str, clients: int) -> LowRank:
        """Returns the part of the mean change that the averaged factors miss.

        Args:
            mean: Delta W* of the layer.
            averaged: The averaged factors, rounded for the way. So the residual corrects the rounding, too.
            layer: The layer.
            clients: N, the number of clients.
        """
        residual = mean - averaged.change(layer)
        u, s, v = residual.svd()
        # The residual before rounding has this rank at most. Singular values beyond it come from rounding alone.
        most = (clients - 1) * averaged.rank(layer)
        # The smallest singular values are dropped, as long as their norm stays below one rounding of the mean change.
        tolerance = ROUNDING * mean.norm()
        needed = _needed(s, tolerance)
        kept = min(needed, most, self._rank or most)
        return balanced(u, s, v, kept)
