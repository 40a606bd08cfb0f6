"""Geometric median (RFA, 1912.13445), by smoothed Weiszfeld steps.

Rule: z <- sum_i b_i theta_i / sum_i b_i with b_i = w_i / max(nu, ||theta_i - z||), some times over; it tends to the
point of the least sum of w-weighted distances. nu is absolute, in the units of the distances, as in the paper.
The distance is that of the changes s_i B_i A_i and s B_z A_z of all layers together, which no rotation of a client's
factors alters (`on` = "product"), or of all factors as one vector (`on` = "factors", the paper's).
On products z is still an average of factors, so that it has their rank: the b_i are those of the products, but the
average sees a rotation as FedAvg's does, and z need not be the point of the least sum.
The paper lets z begin anywhere. Here the first b_i are w_i / max(nu, d, ||theta_i - theta||), with theta what the
round started from and d the median of these distances: from the plain mean, ten steps are too few to get away
from a client at 1e6, and from theta itself one that returns what it was given would hold z where it is.
Needs: equal ranks; every client's own adapters. Costs: FedAvg's traffic; O(n (out + in) r^2) a layer and step.
Tensors that are no factor of a pair count in the distances as they are, and are averaged with the same b_i.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from fedsplit.updates import Adapters, ClientUpdate, Traits, average_adapters, counted
from strategies.distances import Cloud, check_kind


class GeometricMedian:
    """The point from which it is the least way to all clients."""

    traits = Traits()

    def __init__(self, on: str = "product", iterations: int = 10, nu: float = 1e-6) -> None:
        """Sets the search.

        Args:
            on: What distances are of: "product" or "factors".
            iterations: Weiszfeld steps.
            nu: The distance, absolute, below which a client's weight does not rise any more.
        """
        check_kind(on)
        if iterations < 1:
            raise ValueError(f"iterations is {iterations}; it must be 1 or more")
        if not 0 < nu < math.inf:
            raise ValueError(f"nu is {nu}; it must be more than 0")
        self.on, self.iterations, self.nu = on, iterations, nu
        self.traits = Traits(multiplies=on == "product")

    def init(self, adapters: Adapters) -> Mapping[str, Tensor]:
        """The geometric median remembers nothing."""
        return {}

    def aggregate(
        self, state: Mapping[str, Tensor], adapters: Adapters, updates: Sequence[ClientUpdate]
    ) -> tuple[Mapping[str, Tensor], Adapters]:
        """Searches in float64, and rounds the last average once.

        Raises:
            ValueError: No client has any example.
        """
        ordered, shares = counted(updates)
        cloud = Cloud([update.adapters for update in ordered], self.on)
        travelled = cloud.squared_distances(adapters).sqrt()
        betas = _betas(shares, travelled, max(self.nu, float(travelled.median())))
        exact = [replace(update, adapters=_exact(update.adapters)) for update in ordered]
        for _ in range(self.iterations):
            centre = average_adapters(adapters, exact, betas)
            betas = _betas(shares, cloud.squared_distances(centre).sqrt(), self.nu)
        return state, average_adapters(adapters, ordered, betas)


def _exact(adapters: Adapters) -> Adapters:
    """The same in float64."""
    return adapters.with_tensors({name: tensor.double() for name, tensor in adapters.tensors.items()})


def _betas(shares: Sequence[float], distances: Tensor, least: float) -> list[float]:
    """The weights w_i / max(least, distance_i), which sum to 1."""
    weights = [share / max(least, distance) for share, distance in zip(shares, distances.tolist(), strict=True)]
    whole = math.fsum(weights)
    return [weight / whole for weight in weights]
