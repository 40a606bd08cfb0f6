"""Averages for clients of different ranks: padding with zeros, and the mean of tensors without a rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedsplit.updates import Adapters, ClientUpdate, average_adapters


def rank_of(adapters: Adapters) -> int:
    """Returns the largest rank among the layers that hold both factors; 1 if there are none."""
    return adapters.largest_rank or 1


def average_others(adapters: Adapters, updates: Sequence[ClientUpdate], weights: Sequence[float]) -> Adapters:
    """Returns the adapters with the weighted mean of all tensors that are no LoRA factor, as FedAvg averages them.

    Args:
        adapters: Adapters that keep their LoRA factors.
        updates: The clients' updates.
        weights: Weight of each update; they sum to 1.
    """
    others = [replace(update, adapters=update.adapters.only(frozenset())) for update in updates]
    return average_adapters(adapters, others, weights)


def padded_average(
    adapters: Adapters, updates: Sequence[ClientUpdate], weights: Sequence[float]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns the weighted means of the factors, each client's padded with zeros to the rank of `adapters`.

    B is padded together with its scaling, so that a padded client changes the weights as before. Rows of A that no
    client held would become zero together with their columns of B, and would never get a gradient again. Such rows
    keep their values in `adapters`; with zero columns of B they do not alter the product.

    Args:
        adapters: Adapters at the largest rank.
        updates: The clients' updates, each at its client's rank.
        weights: Weight of each update; they sum to 1.

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
        # Rows that no client holds keep their values.
        mean_a[largest_sent:] = a[largest_sent:]
        means[layer] = mean_a, mean_b

    for update, weight in zip(updates, weights, strict=True):
        exact = {name: tensor.double() for name, tensor in update.adapters.tensors.items()}
        padded = update.adapters.with_tensors(exact).with_rank(rank)
        for layer, (mean_a, mean_b) in means.items():
            a, b = padded.factors(layer)
            mean_a += a * weight
            mean_b += b * weight
    return means
