"""Krum and Multi-Krum (1703.02757): the clients that are nearest to their neighbours.

Rule: score_i = the sum of the squared distances of client i to the n - f - 2 others nearest to it, n being how many
answered and f how many may be malicious. Krum takes the client of the lowest score; Multi-Krum the w-weighted
average of the m of the lowest scores. A tie goes to the client of the lower number.
The distances are those of the changes s_i B_i A_i, which no rotation of a client's factors alters (`on` =
"product"), or of all factors as one vector (`on` = "factors", the paper's, and Flower's numbers).
Needs: equal ranks; n >= 2 f + 3; every client's own adapters. Costs: FedAvg's traffic; O(n^2 (out + in) r^2) a layer
on products, O(n^2 (out + in) r) on factors. The paper's average of the m is not weighted; Flower's is, and this one.
Tensors that are no factor of a pair count in the distances as they are, and are taken from the same clients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedsplit.updates import Adapters, ClientUpdate, Traits, average_adapters, counted
from strategies.distances import Cloud, check_kind


def scores(points: Sequence[Adapters], malicious: int, on: str) -> Tensor:
    """Krum's scores, in the order of the points.

    Raises:
        ValueError: There are too few points for so many malicious ones.
    """
    n = len(points)
    if n < 2 * malicious + 3:
        raise ValueError(
            f"{n} clients answered, but Krum needs {2 * malicious + 3} with malicious = {malicious} (2 * malicious + 3)"
        )
    cloud = Cloud(points, on)
    found = []
    for number, point in enumerate(points):
        distances = cloud.squared_distances(point)
        others = torch.cat([distances[:number], distances[number + 1 :]])
        found.append(others.sort().values[: n - malicious - 2].sum())
    return torch.stack(found)


class MultiKrum:
    """The weighted average of the clients that are nearest to their neighbours."""

    traits = Traits(fewest=3)

    def __init__(self, malicious: int = 0, keep: int = 0, on: str = "product") -> None:
        """Sets how many are trusted.

        Args:
            malicious: f, how many clients may be malicious.
            keep: m, how many clients are averaged; 0: n - f, as in the paper's experiments.
            on: What distances are of: "product" or "factors".
        """
        check_kind(on)
        for name, value in (("malicious", malicious), ("keep", keep)):
            if value < 0:
                raise ValueError(f"{name} is {value}; it must be 0 or more")
        self.malicious, self.keep, self.on = malicious, keep, on
        self.traits = Traits(fewest=max(2 * malicious + 3, keep), multiplies=on == "product")

    def init(self, adapters: Adapters) -> Mapping[str, Tensor]:
        """Krum remembers nothing."""
        return {}

    def aggregate(
        self, state: Mapping[str, Tensor], adapters: Adapters, updates: Sequence[ClientUpdate]
    ) -> tuple[Mapping[str, Tensor], Adapters]:
        """Averages those chosen.

        Raises:
            ValueError: No client has any example, or fewer answered than 2 * malicious + 3 or than are to be kept.
        """
        ordered, _ = counted(updates)
        ranked = scores([update.adapters for update in ordered], self.malicious, self.on).argsort(stable=True)
        keep = self.keep or len(ordered) - self.malicious
        if keep > len(ordered):
            raise ValueError(f"{len(ordered)} clients answered, of whom Multi-Krum is to keep {keep}")
        chosen = [ordered[int(number)] for number in ranked[:keep]]
        return state, average_adapters(adapters, *counted(chosen))


class Krum(MultiKrum):
    """The adapters of the client that is nearest to its neighbours, to the bit."""

    def __init__(self, malicious: int = 0, on: str = "product") -> None:
        """Sets how many are trusted.

        Args:
            malicious: f, how many clients may be malicious.
            on: What distances are of: "product" or "factors".
        """
        super().__init__(malicious, 1, on)
