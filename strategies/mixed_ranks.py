"""Averages for clients of different ranks: padding with zeros, and the mean of tensors without a rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedsplit.updates import Adapters, ClientUpdate, average_adapters


def rank_of(adapters: Adapters) -> int:
    """Returns the largest rank among the layers with both factors, or 1 without a layer.

    Example:
        >>> from strategies.example import lora
        >>> rank_of(lora(A=[[1], [2]], B=[[3, 4]]))
        2
    """
    return adapters.largest_rank or 1


def average_others(adapters: Adapters, updates: Sequence[ClientUpdate], weights: Sequence[float]) -> Adapters:
    """Returns the adapters with FedAvg's mean of all tensors except LoRA factors. The LoRA factors stay unchanged.

    Args:
        adapters: The adapters.
        updates: Updates of the clients.
        weights: Weights of the updates, with a sum of 1.
    """
    without_factors = []
    for update in updates:
        others = update.adapters.only(frozenset())  # neither A nor B
        without_factors.append(replace(update, adapters=others))
    return average_adapters(adapters, without_factors, weights)


def padded_average(
    adapters: Adapters,
    updates: Sequence[ClientUpdate],
    weights: Sequence[float],
) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns the weighted means of the factors, padded with zeros to the rank of `adapters`.

    Padding keeps the change s B A, though s depends on the rank: B takes up the ratio of the scalings. A row of A
    without any client would become zero together with the column of B, and would never get a gradient again. So the row
    keeps the value in `adapters`. With a zero column of B, the row does not alter the product.

    Args:
        adapters: Adapters at the largest rank.
        updates: Updates of the clients, each at the client's rank.
        weights: Weights of the updates, with a sum of 1.

    Returns:
        Factors (A, B) by layer, in float64 and not rounded yet.

    Example:
        >>> from strategies.example import lora
        >>> rank_2 = lora(A=[[1], [2]], B=[[0, 0]], alpha=2)  # s = 1
        >>> rank_1 = lora(A=[[4]], B=[[3]], alpha=2)  # s = 2
        >>> A, B = padded_average(rank_2, [ClientUpdate(0, rank_1, examples=1)], [1.0])["layer"]
        >>> A.tolist(), B.tolist()  # the second row of A keeps its value; B takes up the ratio of the scalings
        ([[4.0], [2.0]], [[6.0, 0.0]])
    """
    rank = rank_of(adapters)
    largest_sent = max(rank_of(update.adapters) for update in updates)

    means = {}
    for layer in adapters.complete:
        a, b = adapters.factors(layer)
        mean_a = torch.zeros_like(a, dtype=torch.float64)
        mean_b = torch.zeros_like(b, dtype=torch.float64)
        mean_a[largest_sent:] = a[largest_sent:]  # rows without any client
        means[layer] = mean_a, mean_b

    for update, weight in zip(updates, weights, strict=True):
        padded = update.adapters.in_float64().with_rank(rank)
        for layer, (mean_a, mean_b) in means.items():
            a, b = padded.factors(layer)
            mean_a += a * weight
            mean_b += b * weight
    return means
