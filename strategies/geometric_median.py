"""Geometric median (RFA, 1912.13445), by smoothed Weiszfeld steps.

Rule, repeated `iterations` times:
    b_i = w_i / max(nu, ||theta_i - z||)
    z <- sum_i b_i theta_i / sum_i b_i
z tends to the point with the least sum of w-weighted distances. nu is absolute, in the units of the distances, as in
the paper.

Distances (`on`): "product" compares the changes s_i B_i A_i and s B_z A_z over all layers. No rotation of a client's
factors alters a change. "factors" compares all factors as one vector, as the paper does. On products, the b_i come from
the products, but z is still an average of factors, so that z keeps the rank of the factors. A rotation of a client's
factors changes this average, as in FedAvg, so z need not be the point with the least sum. Tensors outside of the pairs
of factors count in the distances entry by entry, and are averaged with the same b_i.

Start: the paper leaves z open. In this file the first b_i are w_i / max(nu, d, ||theta_i - theta||), with theta the
adapters at the start of the round, and d the median of the distances from theta. From the plain mean, ten steps are too
few to get away from a client at 1e6. From theta itself, a client that returns theta would hold z in place.

Needs: equal ranks; the adapters of every single client.
Costs: FedAvg's traffic; O(n (out + in) r^2) a layer and step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from fedsplit.updates import Adapters, ClientUpdate, State, Traits, average_adapters, weighted
from strategies.distances import Distances, check_kind


class GeometricMedian:
    """Finds the point with the least sum of distances to all clients.

    Example:
        >>> from strategies.example import lora, one_round
        >>> start = lora(A=[[1]], B=[[0]])
        >>> clients = [lora(A=[[1]], B=[[value]]) for value in (1, 2, 1000)]
        >>> _, B = one_round(GeometricMedian(), start, clients).factors("layer")
        >>> round(B.item(), 2)  # the mean is 334.33
        2.0
    """

    traits = Traits()

    def __init__(self, on: str = "product", iterations: int = 10, nu: float = 1e-6) -> None:
        """Sets the search.

        Args:
            on: Distances between changes ("product"), or between factors ("factors").
            iterations: Number of Weiszfeld steps.
            nu: Smallest distance, in absolute terms. Nearer clients weigh no more than clients at distance nu.

        Raises:
            ValueError: An option is out of range.
        """
        check_kind(on)
        if iterations < 1:
            raise ValueError(f"iterations is {iterations}; it must be 1 or more")
        if not 0 < nu < math.inf:
            raise ValueError(f"nu is {nu}; it must be more than 0")
        self.on = on
        self.iterations = iterations
        self.nu = nu
        self.traits = Traits(multiplies=on == "product")

    def init(self, adapters: Adapters) -> State:
        """Returns an empty state: the geometric median remembers nothing."""
        return {}

    def aggregate(self, state: State, adapters: Adapters, updates: Sequence[ClientUpdate]) -> tuple[State, Adapters]:
        """Makes the Weiszfeld steps in float64 and rounds the last average once.

        Raises:
            ValueError: No client trained on any example.
        """
        updates, weights = weighted(updates)
        clients = [update.adapters for update in updates]
        distances = Distances(clients, self.on)

        # The first weights: by the distances from the start of the round.
        from_start = distances.squared(adapters).sqrt()
        median = float(from_start.median())
        betas = _betas(weights, from_start, max(self.nu, median))

        # The search runs in float64; only the result is rounded to the type of the updates.
        exact = []
        for update in updates:
            exact.append(replace(update, adapters=update.adapters.in_float64()))
        for _ in range(self.iterations):
            z = average_adapters(adapters, exact, betas)
            from_z = distances.squared(z).sqrt()
            betas = _betas(weights, from_z, self.nu)
        return state, average_adapters(adapters, updates, betas)


def _betas(weights: Sequence[float], distances: Tensor, nu: float) -> list[float]:
    """Returns the b_i = w_i / max(nu, distance_i), normalised to a sum of 1.

    Example:
        >>> import torch
        >>> _betas([0.5, 0.5], torch.tensor([1.0, 3.0]), nu=1e-6)
        [0.75, 0.25]
    """
    betas = []
    for weight, distance in zip(weights, distances.tolist(), strict=True):
        betas.append(weight / max(nu, distance))
    total = math.fsum(betas)
    return [beta / total for beta in betas]
