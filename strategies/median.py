"""Coordinate-wise median (1803.01498).

Rule: every entry becomes the median of the clients' values; of an even number, the mean of the two in the middle.
Needs: equal ranks; every client's own adapters. Costs: FedAvg's traffic; sorting n values an entry. Examples do not
weight: a client could claim any number of them. The numbers are those of Flower's FedMedian. It acts on the factors:
two that agree on B A but not on the factors count as apart. Tensors that are no factors are treated the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fedsplit.updates import Adapters, ClientUpdate, Traits, counted
from strategies.trimmed_mean import trimmed


class Median:
    """The median of every entry."""

    traits = Traits()

    def init(self, adapters: Adapters) -> Mapping[str, Tensor]:
        """The median remembers nothing."""
        return {}

    def aggregate(
        self, state: Mapping[str, Tensor], adapters: Adapters, updates: Sequence[ClientUpdate]
    ) -> tuple[Mapping[str, Tensor], Adapters]:
        """Takes the middle: `torch.median` would take the lower one of two.

        Raises:
            ValueError: No client has any example.
        """
        ordered, _ = counted(updates)
        return state, adapters.with_tensors({**adapters.tensors, **trimmed(ordered, (len(ordered) - 1) // 2)})
