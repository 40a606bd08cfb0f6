"""Gradients in float16, which knows nothing between 0 and 6e-8 and nothing above 65504.

Loss scaling (1710.03740) multiplies the loss by a number so that gradients fall into that range, and divides by it
before the optimiser steps. Here every part does so for itself: it scales the gradient that its own backward begins
with, by a power of two that depends on that gradient alone, and divides what comes out in float32. Where something
overflowed it goes back again with a smaller scale.

So the scale never leaves a part. What crosses, is summed over micro-batches, clients or a barrier, or comes to an
optimiser is the gradient itself, under every schedule; no step is skipped by one party and made by another, none is
lost, and nothing depends on which steps were computed before. The price is a graph that is kept until its backward is
over. (On the wire a gradient of float16 has a power of two of its own, see `fedsplit.wire.codecs`.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_LOSS = 2.0**15
"""What a loss is multiplied by at first: a mean over N tokens gives each of them 1/N of it."""

_BEGIN = 2.0**8
"""What the largest element of a gradient that came over the wire is scaled to at first, at most."""

TOO_LARGE = "values exceed 65504, the most that float16 can hold; --dtype bf16 and fp32 can hold more"
"""What is said of values that float16 cannot hold."""

_LESS = 2.0**-4
_ATTEMPTS = 8


class Overflow(ArithmeticError):
    """Values that are too large for float16 at any scale of the gradient."""


def scale_to(most: float, tensor: Tensor) -> float:
    """The power of two that brings the largest element of a tensor between half of `most` and `most`.

    Args:
        most: A power of two.
        tensor: Of any shape.

    Returns:
        1 where the tensor is zero, empty, or not finite.
    """
    largest = float(tensor.detach().abs().max()) if tensor.numel() else 0.0
    if not 0 < largest < math.inf:
        return 1.0
    exponent = math.frexp(most)[1] - 1 - math.frexp(largest)[1]
    return math.ldexp(1.0, min(max(exponent, -126), 126))


def gradients(output: Tensor, inputs: Sequence[Tensor], start: Tensor | None = None) -> list[Tensor | None]:
    """As `torch.autograd.grad`, of a part that computes in float16.

    Args:
        output: What the part made: hidden states in float16, or a loss.
        inputs: Leaves of its graph.
        start: The gradient by the output, not scaled, in float32; None for a loss.

    Returns:
        The gradients in float32, not scaled, all finite; None for an input that the output does not depend on.

    Raises:
        Overflow: There is no scale at which they are finite.
    """
    wide = torch.ones_like(output) if start is None else start.float()
    scale = _LOSS if start is None else scale_to(_BEGIN, wide)
    for _ in range(_ATTEMPTS if bool(torch.isfinite(output.detach()).all()) else 0):
        begin = (wide * scale).to(output.dtype)
        found = torch.autograd.grad(output, inputs, begin, retain_graph=True, allow_unused=True)
        unscaled: list[Tensor | None] = [None if gradient is None else gradient.float() / scale for gradient in found]
        if all(bool(torch.isfinite(gradient).all()) for gradient in unscaled if gradient is not None):
            return unscaled
        scale *= _LESS
    raise Overflow(TOO_LARGE)


def backward(
    output: Tensor, learning: Iterable[Tensor], entry: Tensor | None = None, start: Tensor | None = None
) -> Tensor | None:
    """The backward of a client's part; adds the gradients of what learns to their `grad`.

    Args:
        output: A loss, or the bottom's hidden states.
        learning: The part's parameters, of which those learn that take a gradient.
        entry: The hidden states (B, T, D) that went into the part, a leaf; None for the bottom, where tokens went in.
        start: The gradient by the output; None for a loss.

    Returns:
        The gradient by the entry, in its type, or in float32 where that is float16; None where it takes none.

    Raises:
        Overflow: As in `gradients`.
    """
    if (output if entry is None else entry).dtype != torch.float16:
        output.backward(start)
        return None if entry is None else entry.grad
    leaves = [parameter for parameter in learning if parameter.requires_grad]
    inputs = [*leaves, *([entry] if entry is not None and entry.requires_grad else [])]
    if not inputs:
        return None
    found = gradients(output, inputs, start)
    for leaf, gradient in zip(leaves, found, strict=False):
        if gradient is not None:
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
    return found[-1] if len(inputs) > len(leaves) else None
