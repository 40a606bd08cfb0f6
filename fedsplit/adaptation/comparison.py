"""Two finished runs side by side: settings, losses, bytes, and how far apart their adapters are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedsplit.adaptation.methods import ADAPTER_METHODS
from fedsplit.config import Config
from fedsplit.documents import as_document, dotted
from fedsplit.lowrank import LowRank
from fedsplit.updates import Adapters, factor_of


@dataclass(frozen=True)
class Distance:
    """How far two changes of the same weights, s * B @ A, or two tensors, are from each other.

    Attributes:
        first: The Frobenius norm of the first.
        second: That of the second.
        apart: That of their difference.
        inner: Their Frobenius inner product.
    """

    first: float
    second: float
    apart: float
    inner: float

    @property
    def relative(self) -> float | None:
        """The norm of the difference by that of the first; None where the first is zero."""
        return self.apart / self.first if self.first else None

    @property
    def cosine(self) -> float | None:
        """The cosine of the angle between them; None where one is zero."""
        length = self.first * self.second
        return max(-1.0, min(1.0, self.inner / length)) if length else None

    def __add__(self, other: Distance) -> Distance:
        """Of both weights together, as if they were one vector."""
        norms = [math.hypot(getattr(self, key), getattr(other, key)) for key in ("first", "second", "apart")]
        return Distance(norms[0], norms[1], norms[2], self.inner + other.inner)


def distance(first: LowRank, second: LowRank) -> Distance:
    """Compares two changes of one weight, without multiplying them out."""
    return Distance(first.norm(), second.norm(), (first - second).norm(), first.inner(second))


def distances(first: Adapters, second: Adapters) -> dict[str, Distance]:
    """The layers that both adapters have, and at which they have the same shape, one by one."""
    found = {}
    for layer in first.complete:
        if layer in second.complete and (one := first.change(layer)).shape == (two := second.change(layer)).shape:
            found[layer] = distance(one, two)
    for layer in first.stacked:
        if layer in second.stacked and _shapes(first, layer) == _shapes(second, layer):
            each = zip(first.changes(layer), second.changes(layer), strict=True)
            apart, *others = (distance(one, two) for one, two in each)
            found[layer] = sum(others, apart)
    return found


def kind_of(config: Config) -> str:
    """The kind of a run's adapter, in PEFT's words; "lora" for all that are left as pairs of factors."""
    if config.prompt.kind != "off":
        return config.prompt.kind
    method = ADAPTER_METHODS[config.lora.method]
    return "lora" if method.factors or method.residual else config.lora.method


def loose(adapters: Adapters) -> dict[str, Tensor]:
    """The tensors of adapters of which no product is to be made: whole heads, and all of a kind without factors."""
    return {
        name: tensor
        for name, tensor in adapters.tensors.items()
        if factor_of(name) is None or name.rpartition(".lora_")[0] not in adapters.layers
    }


def tensor_distances(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Distance]:
    """The tensors that are on both sides and have the same shape, one by one.

    Equal tensors mean equal adapters; what they do to the weights may be equal, too, where tensors are not.
    """
    found = {}
    for name, one in first.items():
        if (other := second.get(name)) is not None and other.shape == one.shape:
            a, b = one.double(), other.double()
            norms = [float(tensor.norm()) for tensor in (a, b, a - b)]
            found[name] = Distance(norms[0], norms[1], norms[2], float((a * b).sum()))
    return found


def _shapes(adapters: Adapters, layer: str) -> tuple[str, int, tuple[int, int]]:
    """Which weight a layer of stacked experts changes, how many there are, and the shape (out, in) of each."""
    changes = adapters.changes(layer)
    return adapters.weight_name(layer), len(changes), changes[0].shape


def differing(first: Config, second: Config) -> dict[str, tuple[object, object]]:
    """The settings in which two runs differ, by dotted name; None for an option that a strategy does not have."""
    one, two = (_flat(config) for config in (first, second))
    return {name: (one.get(name), two.get(name)) for name in {**one, **two} if one.get(name) != two.get(name)}


def _flat(config: Config) -> dict[str, Any]:
    document = as_document(config)
    options: Mapping[str, Any] = document.pop("strategy_options")
    return dotted(document) | {f"strategy.{name}": value for name, value in options.items()}
