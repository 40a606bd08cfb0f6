"""The aggregation error: the distance between a round's applied change and the clients' mean change."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fedsplit.updates import Adapters, ClientUpdate, mean_change, mean_changes, weighted


@dataclass(frozen=True)
class AggregationError:
    """The aggregation error of a round.

    The clients' mean change of a layer is Delta W*, the weighted mean of all s_i B_i A_i. The applied change is
    s B A, plus the change that is folded into the base weights.

    Attributes:
        layers: ||applied - Delta W*|| / ||Delta W*|| in Frobenius norms, by layer. Layers of which a factor stays at
            the client are left out.
        overall: The same over all these layers together; None if there is no such layer, or nothing was trained.
        residual_rank: Rank of the change that is folded into the base weights, by layer.
    """

    layers: dict[str, float]
    overall: float | None
    residual_rank: dict[str, int]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Has torch compute with one thread inside the context.

    The factors are thin: their QR decompositions take longer with two threads, which wait for each other at every
    column, and hundreds of times as long where other processes keep a core busy. The last digits do not depend on the
    number of cores then, either.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
def measure(updates: Sequence[ClientUpdate], result: Adapters) -> AggregationError:
    """Measures the aggregation error of a round, without building any (out, in) matrix.

    Args:
        updates: Updates that the clients sent.
        result: Adapters that the strategy made of them.

    Example:
        The products of two clients are 1 * 1 and 3 * 5, with mean 8. The mean factors give 2 * 3 = 6.

        >>> import torch
        >>> from fedsplit.updates import Layer
        >>> def adapters(a, b):
        ...     tensors = {"l.lora_A.weight": torch.tensor([[a]]), "l.lora_B.weight": torch.tensor([[b]])}
        ...     return Adapters(tensors, {"l": Layer(2.0, False)})
        >>> updates = [ClientUpdate(0, adapters(1.0, 1.0), 1), ClientUpdate(1, adapters(5.0, 3.0), 1)]
        >>> measure(updates, adapters(3.0, 2.0)).overall
        0.25
    """
    ordered, shares = weighted(updates)
    errors: dict[str, float] = {}
    squared_distance = 0.0
    squared_size = 0.0

    for layer in ordered[0].adapters.complete:
        mean = mean_change(ordered, shares, layer)
        applied = result.change(layer)
        if layer in result.folded:
            applied = applied + result.folded[layer].to(mean.up.dtype)
        # Squares of Frobenius norms add up over the layers.
        size, distance = mean.norm_and_distance(applied)

        squared_distance += distance**2
        squared_size += size**2
        # A layer whose mean change is zero has no relative error.
        if size > 0:
            errors[layer] = distance / size

    # Layers of a mixture of experts have one change for each expert.
    for layer in ordered[0].adapters.stacked:
        pairs = zip(mean_changes(ordered, shares, layer), result.changes(layer), strict=True)
        by_expert = [mean.norm_and_distance(applied) for mean, applied in pairs]
        size = math.hypot(*(expert_size for expert_size, _ in by_expert))
        distance = math.hypot(*(expert_distance for _, expert_distance in by_expert))

        squared_distance += distance**2
        squared_size += size**2
        if size > 0:
            errors[layer] = distance / size

    overall = math.sqrt(squared_distance / squared_size) if squared_size > 0 else None
    ranks = {layer: change.rank for layer, change in result.folded.items()}
    return AggregationError(errors, overall, ranks)
