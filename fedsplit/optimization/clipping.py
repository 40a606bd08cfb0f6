"""Clipping by norm, for a gradient with parts at two parties. Neither party sees the gradient of the second party."""

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
    norms = [float(torch.linalg.vector_norm(gradient, dtype=torch.float64)) for gradient in gradients]
    return math.fsum(norm**2 for norm in norms)  # exact, so the order of the tensors does not matter


def coefficient(squared: float, limit: float) -> float:
    """Returns the factor that scales a gradient, as in `torch.nn.utils.clip_grad_norm_`.

    Args:
        squared: Squared norm of the whole gradient.
        limit: Largest norm after clipping.

    Returns:
        A number in (0, 1]; NaN for a gradient that is not finite.

    Example:
        >>> round(coefficient(25.0, limit=1.0), 4)
        0.2
        >>> coefficient(25.0, limit=10.0)
        1.0
    """
    if not math.isfinite(squared):
        return math.nan
    scale = limit / (math.sqrt(squared) + 1e-6)  # torch's constant, for equal bits
    return min(1.0, scale)


class Clip(GradientStage):
    """Scales the gradients of client and trunk by the norm over all parts.

    No gradient crosses: the trunk sends a squared norm, and the client sends a coefficient.

    Example:
        >>> stage = Clip(limit=1.0)
        >>> stage({"w": torch.tensor([3.0, 4.0])}, LocalStep({}))
        {'w': tensor([0.6000, 0.8000])}
    """

    def __init__(self, limit: float) -> None:
        """Takes the largest norm of a step's gradient, above 0."""
        self._limit = limit

    def __call__(self, gradients: Gradients, step: LocalStep) -> Gradients:
        """Returns the scaled gradients, after the trunk has taken the same coefficient."""
        squared = squared_norm(gradients.values())
        if step.trunk is not None:
            squared += step.trunk.squared_norm
        scale = coefficient(squared, self._limit)
        scaled = {name: gradient * scale for name, gradient in gradients.items()}
        if step.trunk is not None:
            step.trunk.scale(scale)  # NaN, too: the trunk refuses it, and the step ends for both
        return scaled
