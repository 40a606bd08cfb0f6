"""A round worked by hand: a few clients, one adapted layer. For the examples here and for trying out a new strategy.

Example:
    >>> from strategies.fedavg import FedAvg
    >>> start = lora(A=[[1, 0]], B=[[0], [0]])
    >>> ann = lora(A=[[1, 2]], B=[[8], [0]])
    >>> bob = lora(A=[[5, -2]], B=[[0], [4]])
    >>> result = one_round(FedAvg(), start, [ann, bob], examples=[1, 3])
    >>> A, B = result.factors("layer")
    >>> A.tolist(), B.tolist()
    ([[4.0, -1.0]], [[2.0], [3.0]])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fedsplit.updates import Adapters, ClientUpdate, Layer

Rows = Sequence[Sequence[float]]
"""A matrix, row by row."""


def lora(A: Rows, B: Rows, alpha: float | None = None) -> Adapters:  # the papers' names
    """Returns the adapters of a model with one LoRA layer, named "layer".

    Args:
        A: The factor A (r, in).
        B: The factor B (out, r).
        alpha: LoRA's alpha; the scaling s is alpha / r. By default alpha is r, and s is 1.

    Example:
        >>> lora(A=[[1, 2]], B=[[3]], alpha=2).scaling("layer")
        2.0
    """
    tensors = {
        "layer.lora_A.weight": torch.tensor(A, dtype=torch.float32),
        "layer.lora_B.weight": torch.tensor(B, dtype=torch.float32),
    }
    if alpha is None:
        alpha = len(A)
    layer = Layer(alpha, transposed=False)
    return Adapters(tensors, {"layer": layer})


def one_round(
    strategy: Any,
    start: Adapters,
    trained: Sequence[Adapters],
    examples: Sequence[int] | None = None,
) -> Adapters:
    """Plays the first round of a strategy, and returns the resulting adapters.

    Args:
        strategy: An object with `init` and `aggregate`.
        start: Adapters at the start of the round.
        trained: Adapters after local training, client by client.
        examples: Number of training examples of each client; by default 1.

    Example:
        >>> from strategies.median import Median
        >>> clients = [lora(A=[[1]], B=[[value]]) for value in (1, 2, 9)]
        >>> one_round(Median(), lora(A=[[1]], B=[[0]]), clients).tensors["layer.lora_B.weight"].tolist()
        [[2.0]]
    """
    counts = examples or [1] * len(trained)
    updates = []
    for client, (adapters, count) in enumerate(zip(trained, counts, strict=True)):
        update = ClientUpdate(client, adapters, examples=count, given=start)
        updates.append(update)

    state = strategy.init(start)
    _, result = strategy.aggregate(state, start, updates)
    return result
