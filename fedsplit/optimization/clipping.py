"""Clipping a gradient by its norm where its parts lie at two parties, neither of which sees the other's."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def squared_norm(gradients: Iterable[Tensor]) -> float:
    """The sum of the squares of all values, in float64, so that it adds up over parties without a loss."""
    return math.fsum(float(torch.linalg.vector_norm(gradient, dtype=torch.float64)) ** 2 for gradient in gradients)


def coefficient(squared: float, limit: float) -> float:
    """What a gradient is to be scaled by, as `torch.nn.utils.clip_grad_norm_` has it.

    Args:
        squared: The squared norm of the whole gradient.
        limit: The largest norm.

    Returns:
        A number in (0, 1]; NaN where the gradient is not finite.
    """
    scale = limit / (math.sqrt(squared) + 1e-6) if math.isfinite(squared) else math.nan
    return scale if math.isnan(scale) else min(1.0, scale)
