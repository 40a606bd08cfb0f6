"""How large values may be, so that nothing that is computed from them overflows.

An optimiser squares gradients, norms of layers square hidden states. A value whose square float32 cannot hold is
finite, and makes something of it that is not: an infinite second moment under AdamW never goes away again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

LARGEST_NORM = math.sqrt(torch.finfo(torch.float32).max)
"""Norm up to which the sum of the squares of some values is finite in float32: 1.8e19."""

LARGEST_SHARE = 1e6
"""Norm up to which a client's gradient is taken where it is not clipped; those of mean losses stay below 1e4.

Finite is not enough: AdamW remembers squares. After one gradient of 1e14 a coordinate hardly moves again, as the mean
squared gradient takes tens of thousands of steps to forget it.
"""


def norm(tensors: Iterable[Tensor]) -> float:
    """Returns the norm over all values, computed in float32.

    It is NaN or infinite where a value is, and infinite where the sum of the squares overflows: one look tells both,
    ten times as fast as `torch.isfinite`.

    Args:
        tensors: Of any shapes and floating-point types, on one device.

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
        joined = joined.float()  # the norm would refuse to narrow it
    return float(torch.linalg.vector_norm(joined, dtype=torch.float32))


def is_bounded(*tensors: Tensor) -> bool:
    """Returns whether all values are finite, and so is the sum of their squares."""
    return math.isfinite(norm(tensors))
