"""The optimiser that clients and trunk train their adapters with."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fedsplit.config import TrainSettings


def make_optimizer(parameters: Iterable[Tensor], settings: TrainSettings) -> torch.optim.Optimizer | None:
    """AdamW (1711.05101) with PyTorch's defaults for the moments, or plain SGD.

    Args:
        parameters: What is trained.
        settings: Which one, learning rate and weight decay.

    Returns:
        The optimiser; None where there is nothing to train, as for a bottom without blocks.
    """
    trained = list(parameters)
    if not trained:
        return None
    if settings.optimizer == "sgd":
        return torch.optim.SGD(trained, lr=settings.lr, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(trained, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
