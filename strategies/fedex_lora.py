"""FedEx-LoRA (2410.09432): FedAvg, and what it leaves out is folded into the base.

Rule: A <- Abar, B <- Bbar, W <- W + DW* - s Bbar Abar, with DW* = sum_i w_i s_i B_i A_i. For equal ranks what is
folded is sum_i w_i s (B_i - Bbar)(A_i - Abar), of rank (N - 1) r at most. Clients of other ranks are first brought to
the largest, with zeros, by which s_i B_i A_i stays what it is; then the same holds with that rank for r. Exact, with
the factors kept from round to round.
Needs: nothing; ranks may differ. Costs: both factors up and down, and down the residual's factors to every client,
also to those that did not take part; the server does a QR and an SVD of stacked factors of inner dimension
sum_i r_i + r a layer. `rank` > 0 sends the residual's best fit of that rank instead (Eckart and Young), which is
cheaper and no longer exact.

With different ranks a client of rank r_i starts from the first r_i rows of A (columns of B) only, and what it returns
does not hold the others: exact is the mean of what the clients returned, in which these count as zero there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedsplit.lowrank import LowRank, balanced
from fedsplit.updates import Adapters, ClientUpdate, Traits, average_adapters, counted, mean_change

ROUNDING = 2.0**-24
"""The relative error of rounding to float32, which is what the averages were sent with."""


def _needed(singular: Tensor, missing: float) -> int:
    """How many singular values must be kept, so that no more than this is missing in the Frobenius norm."""
    tails = singular.square().flip(0).cumsum(0).flip(0).sqrt()
    return int((tails > missing).sum())


class FedExLoRA:
    """The weighted average of the factors, with a residual that makes it exact.

    Args:
        rank: The most that the residual's rank may be; 0 for no limit, by which the aggregate is exact.
    """

    traits = Traits(mixed_ranks=True, folds=True, factors=True)

    def __init__(self, rank: int = 0) -> None:
        if not isinstance(rank, int) or rank < 0:
            raise ValueError(f"rank is {rank!r}; allowed: a whole number, 0 for an exact residual")
        self._rank = rank

    def init(self, adapters: Adapters) -> Mapping[str, Tensor]:
        """FedEx-LoRA remembers nothing."""
        return {}

    def aggregate(
        self, state: Mapping[str, Tensor], adapters: Adapters, updates: Sequence[ClientUpdate]
    ) -> tuple[Mapping[str, Tensor], Adapters]:
        """Averages every factor at the largest rank, and folds what that leaves out.

        Raises:
            ValueError: No client has any example.
        """
        ordered, shares = counted(updates)
        grown = [replace(update, adapters=update.adapters.with_rank(adapters.largest_rank)) for update in ordered]
        averaged = average_adapters(adapters, grown, shares)
        residuals = {
            layer: self._residual(mean_change(ordered, shares, layer), averaged, layer, len(ordered))
            for layer in adapters.complete
        }
        folded = {layer: residual.to(torch.float32) for layer, residual in residuals.items() if residual.rank}
        return state, replace(averaged, folded=folded)

    def _residual(self, wanted: LowRank, averaged: Adapters, layer: str, clients: int) -> LowRank:
        """What the averaged factors leave out of the change that is wanted.

        They are taken as they are sent, so that the residual makes up for their rounding, too. The bound on the rank
        is that of the averages before rounding: singular values beyond it come from rounding alone, and are dropped,
        as are the least, as long as all of them together are less than one rounding of what is wanted.
        """
        u, s, v = (wanted - averaged.change(layer)).svd()
        most = (clients - 1) * averaged.rank(layer)
        kept = min(_needed(s, ROUNDING * wanted.norm()), most, self._rank or most)
        return balanced(u, s, v, kept)
