"""Gradient scaling for float16, which has no values between 0 and 6e-8 and none above 65504.

Loss scaling (1710.03740) multiplies the loss by a number so that gradients fall into that range, and divides by it
before the optimiser's step. Here every part of the model does so by itself. It scales the gradient that its backward
begins with, by a power of two that depends on that gradient alone, and divides the results in float32. Where a value
overflows, it repeats the backward with a smaller scale.

So the scale never leaves a part. Under every schedule, the gradient itself crosses, is summed over micro-batches,
clients or a barrier, and comes to an optimiser. No step is lost, or skipped by one party and made by another, and
nothing depends on earlier steps. The price is a graph that is kept until its backward is over. (On the wire, a float16
gradient is multiplied by another power of two; see `fedsplit.wire.casting`.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_LOSS = 2.0**15
"""First factor of a loss: a mean over N tokens gives each of them 1/N of it."""

_BEGIN = 2.0**8
"""Largest element, after the first scaling, of a gradient that came over the wire."""

TOO_LARGE = "values exceed 65504, the most that float16 can hold; --dtype bf16 and fp32 can hold more"
"""Message about values that float16 cannot hold."""

_LESS = 2.0**-4
_ATTEMPTS = 8


class Overflow(ArithmeticError):
    """Values are too large for float16 at every scale of the gradient."""


def scale_to(most: float, tensor: Tensor) -> float:
    """Returns the power of two that brings the largest element of a tensor between half of `most` and `most`.

    Args:
        most: A power of two.
        tensor: Tensor of any shape.

    Returns:
        The power of two; 1 where the tensor is zero, empty, or not finite.

    Example:
        >>> scale_to(8.0, torch.tensor([0.5, -1.5]))
        4.0
    """
    largest = float(tensor.detach().abs().max()) if tensor.numel() else 0.0
    if not 0 < largest < math.inf:
        return 1.0
    exponent = math.frexp(most)[1] - 1 - math.frexp(largest)[1]
    return math.ldexp(1.0, min(max(exponent, -126), 126))


def gradients(output: Tensor, inputs: Sequence[Tensor], start: Tensor | None = None) -> list[Tensor | None]:
    """Computes gradients as `torch.autograd.grad` does, for a part that computes in float16.

    Args:
        output: Output of the part: hidden states in float16, or a loss.
        inputs: Leaves of its graph.
        start: Gradient by the output, not scaled, in float32; None for a loss.

    Returns:
        Gradients in float32, not scaled, all finite; None for an input that the output does not depend on.

    Raises:
        Overflow: They are not finite at any scale.
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
    """Computes the backward of a client's part, and adds the gradients of its trained parameters to their `grad`.

    Args:
        output: A loss, or the hidden states of the bottom.
        learning: Parameters of the part; those that require a gradient are trained.
        entry: Hidden states (B, T, D) that went into the part, a leaf; None for the bottom, where tokens went in.
        start: Gradient by the output; None for a loss.

    Returns:
        Gradient by the entry, in its type, or in float32 where that is float16; None where it requires none.

    Raises:
        Overflow: The gradients are not finite at any scale.
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
