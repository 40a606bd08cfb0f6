"""Compares two finished runs: the differing settings, and the distance between the adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedsplit.adaptation.methods import ADAPTER_METHODS
from fedsplit.lowrank import LowRank
from fedsplit.settings.config import OPTIONS, Config
from fedsplit.settings.documents import as_document, dotted
from fedsplit.updates import Adapters, factor_of


@dataclass(frozen=True)
class Distance:
    """Distance between two changes of equal weights, or between two tensors of equal shape.

    Attributes:
        first: Frobenius norm of the first change.
        second: Frobenius norm of the second change.
        apart: Frobenius norm of the difference.
        inner: Frobenius inner product of both changes.

    Example:
        >>> Distance(first=3.0, second=4.0, apart=5.0, inner=0.0).cosine
        0.0
    """

    first: float
    second: float
    apart: float
    inner: float

    @property
    def relative(self) -> float | None:
        """Norm of the difference divided by the norm of the first change; None if the first change is zero."""
        return self.apart / self.first if self.first else None

    @property
    def cosine(self) -> float | None:
        """Cosine of the angle between both changes; None if either is zero."""
        length = self.first * self.second
        if not length:
            return None
        return max(-1.0, min(1.0, self.inner / length))  # rounding can push the quotient beyond 1

    def __add__(self, other: Distance) -> Distance:
        """Returns the distance over several weights together, as if the weights were one vector."""
        return Distance(
            first=math.hypot(self.first, other.first),
            second=math.hypot(self.second, other.second),
            apart=math.hypot(self.apart, other.apart),
            inner=self.inner + other.inner,
        )


def distance(first: LowRank, second: LowRank) -> Distance:
    """Returns the distance between two changes of one weight. The factors are not multiplied.

    Example:
        >>> import torch
        >>> ones = LowRank(torch.ones(2, 1), torch.ones(1, 2))
        >>> round(distance(ones, ones.times(3.0)).relative, 6)
        2.0
    """
    difference = first - second
    return Distance(
        first=first.norm(),
        second=second.norm(),
        apart=difference.norm(),
        inner=first.inner(second),
    )


def distances(first: Adapters, second: Adapters) -> dict[str, Distance]:
    """Returns the distance at every layer that both adapters have in equal shapes."""
    by_layer = {}
    for layer in first.complete:
        if layer not in second.complete:
            continue
        first_change = first.change(layer)
        second_change = second.change(layer)
        if first_change.shape == second_change.shape:  # the runs may have models of different sizes
            by_layer[layer] = distance(first_change, second_change)

    for layer in first.stacked:
        if layer in second.stacked and _shapes(first, layer) == _shapes(second, layer):
            pairs = zip(first.changes(layer), second.changes(layer), strict=True)
            first_expert, *more_experts = [distance(one, two) for one, two in pairs]
            by_layer[layer] = sum(more_experts, first_expert)  # from the first, as 0 + Distance is not defined
    return by_layer


def kind_of(config: Config) -> str:
    """Returns the kind of a run's adapter: "lora" for every method whose result is a pair of factors."""
    if config.prompt.kind != "off":
        return config.prompt.kind
    method = ADAPTER_METHODS[config.lora.method]
    return "lora" if method.factors or method.residual else config.lora.method


def loose(adapters: Adapters) -> dict[str, Tensor]:
    """Returns the tensors that are no LoRA factors: full heads, and all tensors of further kinds of adapters."""
    tensors = {}
    for name, tensor in adapters.tensors.items():
        layer = name.rpartition(".lora_")[0]
        if factor_of(name) is None or layer not in adapters.layers:
            tensors[name] = tensor
    return tensors


def tensor_distances(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Distance]:
    """Returns the distance between tensors of equal name and shape.

    Different tensors do not mean different adapters: both may change the weights alike.

    Example:
        >>> import torch
        >>> tensor_distances({"head": torch.tensor([3.0])}, {"head": torch.tensor([4.0])})["head"].apart
        1.0
    """
    by_name = {}
    for name, tensor in first.items():
        other = second.get(name)
        if other is None or other.shape != tensor.shape:
            continue
        a = tensor.double()
        b = other.double()
        by_name[name] = Distance(
            first=float(a.norm()),
            second=float(b.norm()),
            apart=float((a - b).norm()),
            inner=float((a * b).sum()),
        )
    return by_name


def _shapes(adapters: Adapters, layer: str) -> tuple[str, int, tuple[int, int]]:
    """Returns the weight that a layer of stacked experts changes, the number of experts, and an expert's (out, in)."""
    changes = adapters.changes(layer)
    return adapters.weight_name(layer), len(changes), changes[0].shape


def differing(first: Config, second: Config) -> dict[str, tuple[object, object]]:
    """Returns the settings in which two runs differ, by dotted name, with both values.

    The value of an option that a run's strategy does not have is None.

    Example:
        >>> differing(Config(clients=4), Config(clients=8))
        {'clients': (4, 8)}
    """
    first_values = _by_dotted_name(first)
    second_values = _by_dotted_name(second)
    differences = {}
    for name in {**first_values, **second_values}:  # a dict keeps the order of the settings; a set would not
        pair = first_values.get(name), second_values.get(name)
        if pair[0] != pair[1]:
            differences[name] = pair
    return differences


def _by_dotted_name(config: Config) -> dict[str, object]:
    document = as_document(config)
    options: dict[str, object] = {}
    for setting, table in OPTIONS.items():
        options |= {f"{setting}.{name}": value for name, value in document.pop(table).items()}
    return dotted(document) | options
