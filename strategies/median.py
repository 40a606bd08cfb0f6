"""Coordinate-wise median (1803.01498).

Rule: every entry becomes the median of the clients' values. For an even number of clients, the median is the mean of
the two values in the middle.

Needs: equal ranks; the adapters of every single client.
Costs: FedAvg's traffic; sorting n values an entry.
Numbers of examples are no weights, since a client could claim any number. The result equals Flower's FedMedian. The
rule acts on the factors: clients that agree on B A but not on the factors count as apart. Tensors outside of the pairs
of factors are treated alike.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedsplit.updates import Adapters, ClientUpdate, State, Traits, weighted
from strategies.trimmed_mean import trimmed_means


class Median:
    """Takes the median of every entry.

    Example:
        >>> from strategies.example import lora, one_round
        >>> start = lora(A=[[1]], B=[[0]])
        >>> clients = [lora(A=[[1]], B=[[value]]) for value in (1, 2, 4, 1000)]
        >>> _, B = one_round(Median(), start, clients).factors("layer")
        >>> B.tolist()
        [[3.0]]
    """

    traits = Traits()

    def init(self, adapters: Adapters) -> State:
        """Returns an empty state: the median remembers nothing."""
        return {}

    def aggregate(self, state: State, adapters: Adapters, updates: Sequence[ClientUpdate]) -> tuple[State, Adapters]:
        """Returns the median of every entry.

        Raises:
            ValueError: No client trained on any example.
        """
        updates, _ = weighted(updates)  # in the order of the clients, and without clients that did not train
        # Drop all but the one or two values in the middle. torch.median would take the lower of two.
        k = (len(updates) - 1) // 2
        medians = trimmed_means(updates, k)
        return state, adapters.updated(medians)
