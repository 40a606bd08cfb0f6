"""How far apart clients' adapters are: as changes to the weights, or as the numbers that were sent.

The same change s B A has many factors: s (B R) (R^-1 A) for any invertible R. Two clients may therefore agree on what
to add to the weights and have factors far apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsplit.updates import Adapters

KINDS = ("product", "factors")
"""What `on` may be."""


def check_kind(on: str) -> None:
    """Makes sure that there are such distances.

    Raises:
        ValueError: There are none.
    """
    if on not in KINDS:
        raise ValueError(f"on is {on!r}; it must be one of {', '.join(KINDS)}")


class Cloud:
    """Clients' adapters of equal ranks, and the distances of others to them.

    On "product" the square of a distance is sum_layers ||s B A - s B' A'||_F^2, which inner products of thin matrices
    give, without any matrix (out, in); what belongs to no pair of factors adds its plain square. On "factors" all
    entries are taken as one vector.
    """

    def __init__(self, points: Sequence[Adapters], on: str) -> None:
        """Stacks the points, in float64.

        Args:
            points: At least one.
            on: "product" or "factors".
        """
        self._layers = points[0].complete if on == "product" else []
        paired = {f"{layer}.lora_{factor}.weight" for layer in self._layers for factor in "AB"}
        self._plain = sorted(points[0].tensors.keys() - paired)
        self._points = self._stack(points)
        self._squares = self._inner(self._points, self._points)

    def squared_distances(self, point: Adapters) -> Tensor:
        """The squares of the distances of a point to all of the cloud, in float64 and in their order."""
        own = self._stack([point])
        products = self._squares + self._inner(own, own) - 2 * self._inner(self._points, own)
        squares = products.clamp(min=0.0)  # rounding may leave less than nothing
        for name in self._plain:
            squares = squares + ((self._points[name] - own[name]) ** 2).flatten(1).sum(1)
        return squares

    def _stack(self, points: Sequence[Adapters]) -> dict[str, Tensor]:
        """All that distances need, with the points in the first dimension."""
        stacked = {name: torch.stack([point.tensors[name].double() for point in points]) for name in self._plain}
        for layer in self._layers:
            changes = [point.change(layer) for point in points]
            stacked[f"{layer}.up"] = torch.stack([change.up for change in changes])
            stacked[f"{layer}.down"] = torch.stack([change.down for change in changes])
        return stacked

    def _inner(self, left: dict[str, Tensor], right: dict[str, Tensor]) -> Tensor:
        """The inner products of the changes of as many points, or of each with a single one, over all layers."""
        whole = torch.zeros(1, dtype=torch.float64)
        for layer in self._layers:
            up = left[f"{layer}.up"].mT @ right[f"{layer}.up"]
            down = left[f"{layer}.down"] @ right[f"{layer}.down"].mT
            whole = whole + (up * down).sum((1, 2))
        return whole
