"""Coordinate-wise trimmed mean (1803.01498).

Rule, entry by entry: of the n clients' values, drop the k smallest and the k largest, k = floor(trim * n); average the
others with equal weights.

Needs: equal ranks; the adapters of every single client.
Costs: FedAvg's traffic; sorting n values an entry.
Numbers of examples are no weights, since a client could claim any number. The number k is the same as in Flower's
FedTrimmedAvg; a trim of 0 is the plain mean. The rule acts on the factors: clients that agree on B A but not on the
factors count as apart. Tensors outside of the pairs of factors are treated alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsplit.updates import Adapters, ClientUpdate, State, Traits, weighted


def trimmed_means(updates: Sequence[ClientUpdate], k: int) -> dict[str, Tensor]:
    """Returns the mean of every entry without its k smallest and k largest values, rounded once.

    Args:
        updates: Updates of the clients, more than 2 k.
        k: Number of values dropped at each end.

    Returns:
        Tensors by exported name.

    Example:
        >>> from strategies.example import lora
        >>> updates = [ClientUpdate(i, lora(A=[[1]], B=[[b]]), examples=1) for i, b in enumerate((-9, 2, 4, 50))]
        >>> trimmed_means(updates, k=1)["layer.lora_B.weight"].tolist()
        [[3.0]]
    """
    means = {}
    for name, tensor in updates[0].adapters.tensors.items():
        of_clients = [update.adapters.tensors[name] for update in updates]
        values = torch.stack(of_clients)  # (n, …)
        rising = values.sort(dim=0).values
        middle = rising[k : len(updates) - k]
        mean = middle.double().mean(0)
        means[name] = mean.to(tensor.dtype)
    return means


class TrimmedMean:
    """Averages every entry without the extremes.

    Example:
        >>> from strategies.example import lora, one_round
        >>> start = lora(A=[[1]], B=[[0]])
        >>> clients = [lora(A=[[1]], B=[[value]]) for value in (-50, 1, 2, 3, 1000)]
        >>> _, B = one_round(TrimmedMean(trim=0.2), start, clients).factors("layer")
        >>> B.tolist()
        [[2.0]]
    """

    traits = Traits()

    def __init__(self, trim: float = 0.2) -> None:
        """Sets the share of dropped values.

        Args:
            trim: Share of the clients dropped at each end; less than half.

        Raises:
            ValueError: trim is negative, or 0.5 or more.
        """
        if not 0 <= trim < 0.5:
            raise ValueError(f"trim is {trim}; it must be at least 0 and less than 0.5")
        self.trim = trim

    def init(self, adapters: Adapters) -> State:
        """Returns an empty state: the trimmed mean remembers nothing."""
        return {}

    def aggregate(self, state: State, adapters: Adapters, updates: Sequence[ClientUpdate]) -> tuple[State, Adapters]:
        """Returns the trimmed mean of every entry.

        Raises:
            ValueError: No client trained on any example.
        """
        updates, _ = weighted(updates)
        k = int(self.trim * len(updates))  # as Flower computes it
        means = trimmed_means(updates, k)
        return state, adapters.updated(means)
