"""How far what was applied in a round is from what the mean client made: the aggregation error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedsplit.updates import Adapters, ClientUpdate, mean_change, mean_changes, weighted


@dataclass(frozen=True)
class Fidelity:
    """The aggregation error of a round.

    Attributes:
        layers: By layer, ||applied - Delta W*|| / ||Delta W*|| in Frobenius norms, with Delta W* the mean of all
            s_i B_i A_i, and applied = s B A + what is folded. Not known where a factor stays at its client.
        overall: The same over all these layers together; None where there is none, or nothing was trained.
        residual_rank: By layer, the rank of what is folded into the base weights.
    """

    layers: dict[str, float]
    overall: float | None
    residual_rank: dict[str, int]


def measure(updates: Sequence[ClientUpdate], result: Adapters) -> Fidelity:
    """Compares what a strategy returned with the mean of what it was given; no (out, in) matrix is built.

    Args:
        updates: What the clients sent.
        result: What came of it.
    """
    ordered, shares = weighted(updates)
    missed = wanted = 0.0
    layers = {}
    for layer in ordered[0].adapters.complete:
        mean = mean_change(ordered, shares, layer)
        applied = result.change(layer)
        if layer in result.folded:
            applied = applied + result.folded[layer].to(mean.up.dtype)
        size, distance = mean.norm_and_distance(applied)
        missed, wanted = missed + distance**2, wanted + size**2
        if size > 0:
            layers[layer] = distance / size
    for layer in ordered[0].adapters.stacked:
        pairs = zip(mean_changes(ordered, shares, layer), result.changes(layer), strict=True)
        by_expert = [mean.norm_and_distance(applied) for mean, applied in pairs]
        size, distance = (math.hypot(*norms) for norms in zip(*by_expert, strict=True))
        missed, wanted = missed + distance**2, wanted + size**2
        if size > 0:
            layers[layer] = distance / size
    overall = math.sqrt(missed / wanted) if wanted > 0 else None
    return Fidelity(layers, overall, {layer: change.rank for layer, change in result.folded.items()})
