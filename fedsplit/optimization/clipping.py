"""Clipping a gradient by its norm where its parts lie at two parties, neither of which sees the other's."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fedsplit.stages import Gradients, GradientStage, LocalStep


def squared_norm(gradients: Iterable[Tensor]) -> float:
    """Returns the sum of the squares of all values, in float64, so that parties' sums add up without a loss.

    Example:
        >>> squared_norm([torch.tensor([3.0]), torch.tensor([4.0])])
        25.0
    """
    return math.fsum(float(torch.linalg.vector_norm(gradient, dtype=torch.float64)) ** 2 for gradient in gradients)


def coefficient(squared: float, limit: float) -> float:
    """Returns the factor that scales a gradient, as in `torch.nn.utils.clip_grad_norm_`.

    Args:
        squared: The squared norm of the whole gradient.
        limit: The largest norm.

    Returns:
        A number in (0, 1]; NaN where the gradient is not finite.

    Example:
        >>> round(coefficient(25.0, limit=1.0), 4)
        0.2
        >>> coefficient(25.0, limit=10.0)
        1.0
    """
    scale = limit / (math.sqrt(squared) + 1e-6) if math.isfinite(squared) else math.nan
    return scale if math.isnan(scale) else min(1.0, scale)


class Clip(GradientStage):
    """Scales a client's gradients by the norm over all parts, and has the trunk scale its own.

    Neither party sends its gradient to the other: the trunk sends its squared norm, the client the coefficient.
    """

    def __init__(self, limit: float) -> None:
        """Takes the largest norm of a step's gradient, above 0."""
        self._limit = limit

    def __call__(self, gradients: Gradients, step: LocalStep) -> Gradients:
        """Returns the gradients scaled, after the trunk has taken the same coefficient."""
        squared = squared_norm(gradients.values())
        if step.trunk is not None:
            squared += step.trunk.squared_norm
        scale = coefficient(squared, self._limit)
        scaled = {name: gradient * scale for name, gradient in gradients.items()}
        if step.trunk is not None:
            step.trunk.scale(scale)
        return scaled
