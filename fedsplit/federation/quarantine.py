"""Holds the updates of a round against each other, and names those that differ too much from the others.

Each update has been checked alone before (`fedsplit.federation.replies`). The norm of an update is that of the change
of the adapters' tensors, factors A and B included, as one vector. It is not that of the product B @ A: the factors are
what strategies average, they exist for every method, rank and personal factor, and `normclip` takes the same norm.

The bound is a multiple of the median norm of the round, which the size of the learning rate and the number of steps do
not change; FLAME (2101.02281) clips by the same median. It holds as long as less than half of the clients send wrong
updates. In a round of fewer than three updates no client is named, as nobody could tell which of two is wrong.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedsplit.updates import ClientUpdate

FEWEST = 3
"""Fewest updates that can be held against each other."""


def change_norm(*pairs: tuple[Mapping[str, Tensor], Mapping[str, Tensor]]) -> float:
    """Returns the norm of the change of some tensors.

    Args:
        pairs: Tensors after and before a change, by name; names that are missing before are passed over.

    Example:
        >>> change_norm(({"a": torch.tensor([3.0, 1.0])}, {"a": torch.tensor([0.0, 1.0])}), ({}, {}))
        3.0
    """
    return math.hypot(
        *(
            float(torch.linalg.vector_norm(tensor.double() - before[name].double()))
            for after, before in pairs
            for name, tensor in after.items()
            if name in before
        )
    )


def too_large(norms: Mapping[int, float], times: float) -> dict[int, str]:
    """Finds the clients whose updates are much larger than those of the others.

    Args:
        norms: Norm of each update, by client.
        times: Multiple of the median norm that an update may have; 0: any.

    Returns:
        The reason by client.

    Example:
        >>> too_large({0: 1.0, 1: 2.0, 2: 9.0}, times=3.0)
        {2: 'sent an update with a norm of 9, more than 3 times the median of the round, 2'}
    """
    if not times or len(norms) < FEWEST:
        return {}
    median = statistics.median(norms.values())
    limit = times * median
    words = f"more than {times:g} times the median of the round, {median:.3g}"
    return {
        client: f"sent an update with a norm of {norm:.3g}, {words}" for client, norm in norms.items() if norm > limit
    }


def without_their_share(updates: Sequence[ClientUpdate]) -> dict[int, str]:
    """Finds the clients that sent no tensors of the strategy's stage while most others did, or the other way round.

    A strategy may count on every update to have them, or on none; where as many clients sent them as did not, those
    without are named.

    Returns:
        The reason by client.
    """
    sent = [update.client for update in updates if update.control]
    lacking = [update.client for update in updates if not update.control]
    if not sent or not lacking:
        return {}
    if len(lacking) <= len(sent):
        return dict.fromkeys(lacking, "sent no tensors of the strategy's stage, which the others sent")
    return dict.fromkeys(sent, "sent tensors of the strategy's stage, which the others did not send")
