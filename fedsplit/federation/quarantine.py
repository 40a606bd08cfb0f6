"""Compares the updates of a round, and finds updates that differ too much from the rest.

Each update alone has been checked before (`fedsplit.federation.replies`). The norm of an update is the norm of the
change of all adapter tensors, factors A and B included, as one vector. The norm of the product B @ A is not used:
strategies average the factors, every method has them, and `normclip` takes the same norm.

The bound is a multiple of the round's median norm, so that it does not depend on the learning rate and on the number of
steps. FLAME (2101.02281) clips by the same median. The bound works while fewer than half of the updates are wrong. With
fewer than three updates no client is named, since nobody could tell which of two updates is wrong.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedsplit.updates import ClientUpdate

FEWEST = 3
"""Fewest updates that can be compared."""


def change_norm(*pairs: tuple[Mapping[str, Tensor], Mapping[str, Tensor]]) -> float:
    """Returns the norm of the change of all tensors together.

    Args:
        pairs: Tensors after and before a change, by name. Names without a tensor before the change are left out.

    Example:
        >>> change_norm(({"a": torch.tensor([3.0, 1.0])}, {"a": torch.tensor([0.0, 1.0])}), ({}, {}))
        3.0
    """
    norms = []
    for after, before in pairs:
        for name, tensor in after.items():
            if name in before:
                change = tensor.double() - before[name].double()
                norms.append(float(torch.linalg.vector_norm(change)))
    return math.hypot(*norms)


def too_large(norms: Mapping[int, float], times: float) -> dict[int, str]:
    """Finds clients with an update much larger than the median.

    Args:
        norms: Norm of the update, by client.
        times: Largest multiple of the median norm; 0 for no bound.

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
    """Finds clients that sent no tensors of the strategy's stage although most clients did, or the reverse.

    A strategy may need the tensors in all updates, or in none. If exactly half of the clients sent tensors, the
    clients without tensors are named.

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
