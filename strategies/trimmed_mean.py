"""Coordinate-wise trimmed mean (1803.01498).

Rule: entry by entry, the k least and the k greatest of the n clients' values are cut off, k = floor(trim * n), and
the others averaged with equal weights.
Needs: equal ranks; every client's own adapters. Costs: FedAvg's traffic; sorting n values an entry. Examples do not
weight: a client could claim any number of them. The cut is counted as Flower's FedTrimmedAvg counts it; a trim of 0
is the plain mean. It acts on the factors: two that agree on B A but not on the factors count as apart. Tensors that
are no factors are treated the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedsplit.updates import Adapters, ClientUpdate, Traits, counted


def trimmed(updates: Sequence[ClientUpdate], cut: int) -> dict[str, Tensor]:
    """The mean of every entry without so many values at each end, by exported name, rounded once."""
    means = {}
    for name, tensor in updates[0].adapters.tensors.items():
        values = torch.stack([update.adapters.tensors[name] for update in updates]).sort(dim=0).values
        means[name] = values[cut : len(updates) - cut].double().mean(0).to(tensor.dtype)
    return means


class TrimmedMean:
    """The mean of every entry without the extremes."""

    traits = Traits()

    def __init__(self, trim: float = 0.2) -> None:
        """Sets the cut.

        Args:
            trim: The share of the clients that is cut off at each end; less than half.
        """
        if not 0 <= trim < 0.5:
            raise ValueError(f"trim is {trim}; it must be at least 0 and less than 0.5")
        self.trim = trim

    def init(self, adapters: Adapters) -> Mapping[str, Tensor]:
        """The trimmed mean remembers nothing."""
        return {}

    def aggregate(
        self, state: Mapping[str, Tensor], adapters: Adapters, updates: Sequence[ClientUpdate]
    ) -> tuple[Mapping[str, Tensor], Adapters]:
        """Cuts and averages.

        Raises:
            ValueError: No client has any example.
        """
        ordered, _ = counted(updates)
        means = trimmed(ordered, int(self.trim * len(ordered)))
        return state, adapters.with_tensors({**adapters.tensors, **means})
