"""Gradient scaling for float16, a type without values between 0 and 6e-8 or above 65504.

Loss scaling (1710.03740) multiplies the loss by a factor, so that gradients fall into the range of float16, and
divides the gradients by the factor before the optimiser's step. In fedsplit, every part of the model scales alone. A
backward begins with a gradient by the part's output. The part scales this gradient by a power of two, which depends on
the gradient alone, and divides the results in float32. If a value overflows, the part repeats the backward with a
smaller scale.

So the scale never leaves a part. Under every schedule, unscaled gradients cross, are summed over micro-batches,
clients or a barrier, and come to an optimiser. No step is lost, no step is skipped by one party and made by a second
party, and nothing depends on earlier steps. The price: a graph is kept until the end of the backward. (On the wire, a
float16 gradient is multiplied by a further power of two; see `fedsplit.wire.casting`.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_LOSS = 2.0**15
"""First factor of a loss. The factor is large, since a mean over N tokens gives each token 1/N of the gradient."""

_BEGIN = 2.0**8
"""Largest element, after the first scaling, of a gradient from the wire."""

TOO_LARGE = "values exceed 65504, the most that float16 can hold; --dtype bf16 and fp32 can hold more"
"""Message about values that float16 cannot hold."""

_LESS = 2.0**-4
"""Factor of the scale after an overflow. A power of two, so that scaling loses no bit."""

_ATTEMPTS = 8
"""Largest number of backwards: the scale falls by 2**28 in all."""


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
    if not tensor.numel():
        return 1.0
    largest = float(tensor.detach().abs().max())
    if not 0 < largest < math.inf:
        return 1.0
    _, exponent_of_most = math.frexp(most)
    _, exponent_of_largest = math.frexp(largest)
    # Minus 1, since `frexp` writes a power of two as 0.5 times the next one.
    exponent = exponent_of_most - 1 - exponent_of_largest
    return math.ldexp(1.0, min(max(exponent, -126), 126))  # the exponents of float32


def gradients(
    output: Tensor,
    inputs: Sequence[Tensor],
    start: Tensor | None = None,
) -> list[Tensor | None]:
    """Computes gradients as `torch.autograd.grad` does, for a part that computes in float16.

    Args:
        output: Output of the part: hidden states in float16, or a loss.
        inputs: Leaves of the output's graph.
        start: Gradient by the output, not scaled, in float32; None for a loss.

    Returns:
        Gradients in float32, not scaled, all finite; None for an input without influence on the output.

    Raises:
        Overflow: The gradients are not finite at any scale.

    Example:
        >>> x = torch.tensor([1e-4], dtype=torch.float16, requires_grad=True)
        >>> (gradient,) = gradients(x * x, [x], start=torch.tensor([1e-4]))
        >>> f"{float(gradient):.1e}"  # below the smallest float16
        '2.0e-08'
    """
    wide = torch.ones_like(output) if start is None else start.float()
    scale = _LOSS if start is None else scale_to(_BEGIN, wide)
    if not bool(torch.isfinite(output.detach()).all()):  # no scale helps
        raise Overflow(TOO_LARGE)
    for _ in range(_ATTEMPTS):
        begin = (wide * scale).to(output.dtype)
        # The graph is kept, as an overflow repeats the backward.
        scaled = torch.autograd.grad(output, inputs, begin, retain_graph=True, allow_unused=True)
        unscaled: list[Tensor | None] = []
        for gradient in scaled:
            unscaled.append(None if gradient is None else gradient.float() / scale)
        used = [gradient for gradient in unscaled if gradient is not None]
        if all(bool(torch.isfinite(gradient).all()) for gradient in used):
            return unscaled
        scale *= _LESS
    raise Overflow(TOO_LARGE)


def backward(
    output: Tensor, learning: Iterable[Tensor], entry: Tensor | None = None, start: Tensor | None = None
) -> Tensor | None:
    """Computes the backward of a client's part, and adds to the `grad` of the trained parameters.

    Args:
        output: A loss, or the hidden states of the bottom.
        learning: Parameters of the part. Parameters that require a gradient are trained.
        entry: Hidden states (B, T, D) at the beginning of the part, a leaf; None for the bottom, which takes tokens.
        start: Gradient by the output; None for a loss.

    Returns:
        Gradient by the entry, in the type of the entry (float32 for float16); None for an entry without gradient.

    Raises:
        Overflow: The gradients are not finite at any scale.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([2.0]))
        >>> entry = torch.tensor([3.0], requires_grad=True)
        >>> backward((weight * entry).sum(), [weight], entry)
        tensor([2.])
        >>> weight.grad
        tensor([3.])
    """
    computed_in = output if entry is None else entry  # a loss is in float32 whatever the part computes in
    if computed_in.dtype != torch.float16:
        output.backward(start)
        return None if entry is None else entry.grad

    leaves = [parameter for parameter in learning if parameter.requires_grad]
    returns_gradient = entry is not None and entry.requires_grad
    inputs = [*leaves, entry] if entry is not None and returns_gradient else leaves
    if not inputs:
        return None
    computed = gradients(output, inputs, start)
    # Not strict: the gradient by the entry, if asked for, comes last and is returned.
    for leaf, gradient in zip(leaves, computed, strict=False):
        if gradient is not None:
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
    return computed[-1] if returns_gradient else None
