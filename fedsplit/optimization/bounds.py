"""Bounds for values, so that no later computation overflows.

An optimiser squares gradients, and norms of layers square hidden states. A value may be finite while the square
overflows float32. An infinite second moment, for example, stays in AdamW for ever.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

LARGEST_NORM = math.sqrt(torch.finfo(torch.float32).max)
"""Largest norm with a finite sum of squares in float32: 1.8e19."""

LARGEST_SHARE = 1e6
"""Largest norm of a client's gradient without clipping. Gradients of mean losses have norms below 1e4.

A finite norm is not enough, since AdamW keeps a mean of squares. After one gradient of 1e14, a coordinate hardly moves
for tens of thousands of steps, until the mean has forgotten the square.
"""


def norm(tensors: Iterable[Tensor]) -> float:
    """Returns the norm over all values, computed in float32.

    The norm is NaN or infinite if a value is, and infinite if the sum of squares overflows. One norm answers both
    questions, ten times as fast as `torch.isfinite`.

    Args:
        tensors: Tensors of any shapes and floating-point types, on one device.

    Example:
        >>> norm([torch.tensor([3.0]), torch.tensor([4.0])])
        5.0
        >>> norm([torch.tensor([1e20, 1e20])])
        inf
    """
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    if not flat:
        return 0.0
    joined = flat[0] if len(flat) == 1 else torch.cat(flat)
    if joined.dtype == torch.float64:
        joined = joined.float()  # `vector_norm` refuses to narrow float64 by its argument `dtype`
    return float(torch.linalg.vector_norm(joined, dtype=torch.float32))


def is_bounded(*tensors: Tensor) -> bool:
    """Returns True if all values and the sum of all squares are finite.

    Example:
        >>> is_bounded(torch.tensor([1.0]), torch.tensor([2.0])), is_bounded(torch.tensor([1e20, 1e20]))
        (True, False)
    """
    return math.isfinite(norm(tensors))
