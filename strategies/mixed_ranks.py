"""What strategies share whose clients may differ in rank: zero-padding, and the mean of what has no rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedsplit.updates import Adapters, ClientUpdate, average_adapters


def rank_of(adapters: Adapters) -> int:
    """The largest rank among the layers that have both factors; 1 where there are none."""
    return adapters.largest_rank or 1


def average_others(adapters: Adapters, updates: Sequence[ClientUpdate], shares: Sequence[float]) -> Adapters:
    """The adapters with everything that is no LoRA factor replaced by its weighted mean, as FedAvg does."""
    bare = [replace(update, adapters=update.adapters.only(frozenset())) for update in updates]
    return average_adapters(adapters, bare, shares)


def padded_average(
    adapters: Adapters, updates: Sequence[ClientUpdate], shares: Sequence[float]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The weighted means of the factors (A, B) by layer, each first filled with zeros to the rank of `adapters`.

    B is filled together with its scaling, so that every padded client adds to the weights what it added before. Rows
    of A that no client held would become zero with their columns of B, and never get a gradient again: they stay as
    they are in `adapters`. Their columns of B are zero, so the product does not see them.

    Returns:
        Factors in float64, not rounded yet.
    """
    rank, held = rank_of(adapters), max(rank_of(update.adapters) for update in updates)
    sums = {}
    for layer in adapters.complete:
        a, b = adapters.factors(layer)
        down, up = torch.zeros_like(a, dtype=torch.float64), torch.zeros_like(b, dtype=torch.float64)
        sums[layer] = down, up
        down[held:] = a[held:]
    for update, share in zip(updates, shares, strict=True):
        doubled = {name: tensor.double() for name, tensor in update.adapters.tensors.items()}
        wide = update.adapters.with_tensors(doubled).with_rank(rank)
        for layer, (down, up) in sums.items():
            a, b = wide.factors(layer)
            down += a * share
            up += b * share
    return sums
