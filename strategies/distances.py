"""Distances between clients' adapters: between the changes to the weights, or between the factors.

One change s B A has many pairs of factors: s (B R) (R^-1 A) for any invertible R. Two clients can agree on the change
and still send factors that lie far apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedsplit.updates import Adapters

KINDS = ("product", "factors")
"""Values of the option `on`."""


def check_kind(on: str) -> None:
    """Checks the option `on`.

    Raises:
        ValueError: `on` is neither "product" nor "factors".

    Example:
        >>> check_kind("angle")
        Traceback (most recent call last):
        ValueError: on is 'angle'; it must be one of product, factors
    """
    if on not in KINDS:
        raise ValueError(f"on is {on!r}; it must be one of {', '.join(KINDS)}")


class Distances:
    """Squared distances from any adapters to the adapters of several clients of equal rank.

    On "product" the squared distance is sum_layers ||s B A - s B' A'||_F^2, plus the squared difference of each tensor
    outside of the pairs of factors. Only thin matrices are multiplied; no matrix (out, in) is built. On "factors" all
    entries form one vector.

    Example:
        >>> from strategies.example import lora
        >>> ann = lora(A=[[1, 0]], B=[[2]])
        >>> bob = lora(A=[[2, 0]], B=[[1]])  # the same product as ann's, from other factors
        >>> Distances([ann, bob], on="product").squared(ann).tolist()
        [0.0, 0.0]
        >>> Distances([ann, bob], on="factors").squared(ann).tolist()
        [0.0, 2.0]
    """

    def __init__(self, clients: Sequence[Adapters], on: str) -> None:
        """Stacks the clients' adapters in float64.

        Args:
            clients: Adapters of one client or more.
            on: "product" or "factors".
        """
        first = clients[0]  # all clients have the same layers, in the same shapes
        self._layers = first.complete if on == "product" else []
        paired = set()
        for layer in self._layers:
            paired.add(f"{layer}.lora_A.weight")
            paired.add(f"{layer}.lora_B.weight")
        self._unpaired = sorted(first.tensors.keys() - paired)
        self._clients = self._stack(clients)
        self._squared_norms = self._inner(self._clients, self._clients)

    def squared(self, adapters: Adapters) -> Tensor:
        """Returns the squared distance to each client (n,), in float64 and in the order of the clients."""
        point = self._stack([adapters])
        # ||x - y||^2 = <x, x> + <y, y> - 2 <x, y>
        squared_norm = self._inner(point, point)
        mixed = self._inner(self._clients, point)
        squares = self._squared_norms + squared_norm - 2 * mixed
        squares = squares.clamp(min=0.0)  # rounding can push a distance of zero below zero
        for name in self._unpaired:
            difference = self._clients[name] - point[name]
            by_client = difference.flatten(1)
            squares = squares + (by_client**2).sum(1)
        return squares

    def _stack(self, adapters: Sequence[Adapters]) -> dict[str, Tensor]:
        """Returns the tensors for distances, stacked over the given adapters in the first dimension."""
        stacked = {}
        for name in self._unpaired:
            of_clients = [each.tensors[name].double() for each in adapters]
            stacked[name] = torch.stack(of_clients)
        for layer in self._layers:
            changes = [each.change(layer) for each in adapters]  # s B A as a pair, in float64
            ups = [change.up for change in changes]
            downs = [change.down for change in changes]
            stacked[f"{layer}.up"] = torch.stack(ups)
            stacked[f"{layer}.down"] = torch.stack(downs)
        return stacked

    def _inner(self, left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> Tensor:
        """Returns sum_layers <left, right> of the changes, pair by pair. A single `right` pairs with every `left`."""
        total = torch.zeros(1, dtype=torch.float64)
        for layer in self._layers:
            # <U D, U' D'> = sum((U^T U') * (D D'^T)): matrices (r, r) in place of (out, in)
            up = left[f"{layer}.up"].mT @ right[f"{layer}.up"]
            down = left[f"{layer}.down"] @ right[f"{layer}.down"].mT
            products = up * down
            total = total + products.sum((1, 2))
        return total
