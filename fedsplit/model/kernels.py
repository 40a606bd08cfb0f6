"""Faster versions of the two most expensive functions of a step: the loss, and a projection with a LoRA adapter.

Results equal the libraries' results up to the order of sums. Memory traffic is saved: frozen weights get no gradient,
and the forward keeps only the tensors for the backward.

Shapes: N rows (tokens), D hidden, V vocabulary, I and O inputs and outputs of a projection, R rank of an adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fedsplit.model.products import product

IGNORED = -100
"""Label of a position without a loss, as everywhere in torch."""

LOGITS = 2**23
"""Number of logits in memory at a time. A larger number costs memory; a smaller number reads the head too often."""

_LEVELS = 2**16
"""Number of levels of 16 random bits."""

_UNDERFLOW = 1e-30
"""Limit for probabilities. A smaller probability has lost digits, and the loss is computed anew from the logits."""


def causal_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    cap: float | None = None,
    low: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """Computes the mean next-token loss of a head without a bias. The head may be trained, or have a LoRA adapter.

    Only a few rows of logits are in memory at a time. The forward also computes the gradients, and the backward only
    scales the gradients. Positions without a label are skipped.

    Args:
        hidden: Input of the head (B, T, D).
        head: Weight of the head (V, D). Products are computed in the type of the weight, everything else in float32.
        labels: Token ids (B, T), `IGNORED` for positions without a loss. The function shifts the labels by one.
        cap: Bound of the soft cap on logits; None without a cap.
        low: Scaled output s * A x (B, T, R) of the adapter's first factor. `low @ up.T` is added to the logits.
        up: Second factor B (V, R) of the adapter.

    Returns:
        The loss in nats, a float32 scalar; NaN if no position has a label.

    Example:
        >>> hidden = torch.zeros(1, 3, 4)
        >>> head = torch.zeros(10, 4)
        >>> causal_loss(hidden, head, torch.tensor([[1, 2, 3]]))  # ten equally likely tokens: ln 10
        tensor(2.3026)
    """
    targets = labels[:, 1:].flatten()
    places = (targets != IGNORED).nonzero().squeeze(1)
    # Rows of the unshifted hidden states: the last position of a sequence predicts nothing.
    length = labels.shape[1] - 1
    rows = places + places // max(length, 1)
    inputs = hidden.flatten(0, 1).index_select(0, rows)
    low_rows = None if low is None else low.flatten(0, 1).index_select(0, rows)
    loss: Tensor = _Loss.apply(  # type: ignore[no-untyped-call]
        inputs,
        head,
        low_rows,
        up,
        targets[places],
        torch.is_grad_enabled(),  # always False inside of the function
        cap,
    )
    return loss


def _factor_type(weight: Tensor) -> torch.dtype:
    """Returns the type for products with a weight: the weight's type, or float32 for float16 on a CPU.

    CPUs are slow in float16.
    """
    slow = weight.dtype == torch.float16 and weight.device.type == "cpu"
    return torch.float32 if slow else weight.dtype


def _bend(scores: Tensor, cap: float | None) -> Tensor | None:
    """Applies the soft cap `cap * tanh(x / cap)` to logits, in place.

    Returns:
        The derivative of the cap at each logit; None without a cap.
    """
    if cap is None:
        return None
    slope = scores.div_(cap).tanh_().square().neg_().add_(1)
    scores.mul_(cap)
    return slope


class _Products:
    """The products of a head with some rows: logits in the forward, gradients in the backward.

    Logits are `rows @ head.T`, plus `low @ up.T` if the head has an adapter.

    Attributes:
        gradients: Gradients by rows, head, low and up; None where none is wanted.
    """

    def __init__(
        self,
        rows: Tensor,
        head: Tensor,
        low: Tensor | None,
        up: Tensor | None,
        wanted: Sequence[bool],
    ) -> None:
        """Allocates memory for the gradients.

        Args:
            rows: (N, D).
            head: (V, D).
            low: (N, R), or None.
            up: (V, R), or None.
            wanted: True for each of the four tensors that gets a gradient, in the order of the arguments.
        """
        self._pairs = [(rows, head)]
        if low is not None and up is not None:
            self._pairs.append((low, up))
        self._type = head.dtype
        self.gradients: list[Tensor | None] = [None] * 4
        for place, (left, right) in enumerate(self._pairs):
            # Without zeros: `back` writes the gradient of each row once.
            if wanted[2 * place]:
                self.gradients[2 * place] = torch.empty_like(left, dtype=head.dtype)
            if wanted[2 * place + 1]:  # in float32: the gradient is a sum over many runs of rows
                self.gradients[2 * place + 1] = torch.zeros_like(right, dtype=torch.float32)

    @property
    def any(self) -> bool:
        """True if any gradient is wanted."""
        return any(gradient is not None for gradient in self.gradients)

    def logits(self, chosen: slice | Tensor, out: Tensor | None = None) -> Tensor:
        """Computes the logits (n, V) of the chosen rows, if possible in the memory `out`."""
        left, right = self._pairs[0]
        logits = product(left[chosen].to(self._type), right.t(), out=out)
        for left, right in self._pairs[1:]:
            narrow_left = left[chosen].to(self._type)
            narrow_right = right.to(self._type)
            logits.addmm_(narrow_left, narrow_right.t())
        return logits

    def back(self, chosen: slice, slopes: Tensor) -> None:
        """Adds to the gradients, given the gradient by the logits (n, V) of the chosen rows."""
        for place, (left, right) in enumerate(self._pairs):
            by_row = self.gradients[2 * place]
            by_weight = self.gradients[2 * place + 1]
            if by_row is not None:
                by_row[chosen] = product(slopes, right.to(self._type))
            if by_weight is not None:
                inputs = left[chosen].to(self._type)
                if by_weight.dtype == slopes.dtype:
                    by_weight.addmm_(slopes.t(), inputs)
                else:
                    by_weight += torch.mm(slopes.t(), inputs)


class _Loss(torch.autograd.Function):
    """Autograd function of `causal_loss`. Takes rows (N, D), head (V, D), low (N, R), up (V, R) and labels (N,)."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        head: Tensor,
        low: Tensor | None,
        up: Tensor | None,
        labels: Tensor,
        graph: bool,
        cap: float | None,
    ) -> Tensor:
        count = len(rows)
        size = len(head)
        head = head.to(_factor_type(head))
        wanted = [graph and need for need in ctx.needs_input_grad[:4]]
        products = _Products(rows, head, low, up, wanted)
        nats = torch.zeros((), device=rows.device)

        # The rows are processed in equal runs of `step` rows, each with about `LOGITS` logits.
        runs = max(1, -(-count * size // LOGITS))
        step = -(-count // runs) if count else 1
        # All runs use the same memory: fresh pages would cost as much as a pass over them.
        buffer = torch.empty(min(step, count), size, dtype=head.dtype, device=rows.device)
        # The soft cap and the softmax need float32. Logits in 16 bits are converted in memory of their own.
        wide = None if head.dtype == torch.float32 else torch.empty_like(buffer, dtype=torch.float32)

        for start in range(0, count, step):
            run = slice(start, start + step)
            label = labels[run]
            logits = products.logits(run, buffer[: len(label)])
            scores = logits if wide is None else wide[: len(label)].copy_(logits)
            slope = _bend(scores, cap)
            if not products.any:
                nats += functional.cross_entropy(scores, label, reduction="sum")
                continue
            _Loss._to_gradient(scores, label, products, start, cap, nats)
            if slope is not None:
                # By the chain rule, the gradient also passes through the soft cap.
                scores.mul_(slope)
            if scores is not logits:
                # Back in the type of the head, in which the products of the gradients are computed.
                logits.copy_(scores)
            products.back(run, logits)
            del logits, scores  # the memory is free before the next run allocates memory

        ctx.count = count
        ctx.types = [None if tensor is None else tensor.dtype for tensor in (rows, head, low, up)]
        ctx.save_for_backward(*products.gradients)
        return nats / count

    @staticmethod
    def _to_gradient(
        scores: Tensor, label: Tensor, products: _Products, start: int, cap: float | None, nats: Tensor
    ) -> None:
        """Turns logits into the gradient of the summed loss by the logits, in place.

        The gradient is the probability, minus 1 at the label.

        Args:
            scores: Logits (n, V) of a run of rows, after the soft cap.
            label: Labels of the rows (n,).
            products: Source of logits.
            start: Number of the first row.
            cap: Bound of the soft cap on logits; None without a cap.
            nats: Sum of losses so far. The losses of the rows are added in place.
        """
        torch.softmax(scores, -1, out=scores)
        chosen = scores.gather(1, label[:, None])
        underflown = (chosen < _UNDERFLOW).squeeze(1)
        if underflown.any():
            # The softmax has written over the logits in float32. The few logits are computed again.
            again = products.logits(start + underflown.nonzero().squeeze(1)).float()
            _bend(again, cap)
            nats += functional.cross_entropy(again, label[underflown], reduction="sum")
        nats -= chosen[~underflown].log().sum()
        scores.scatter_(1, label[:, None], chosen - 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # A batch without any label has gradients of 0, which a division by a count of 0 would turn into NaN.
        factor = gradients[0] / max(ctx.count, 1)
        scaled: list[Tensor | None] = []
        for gradient, dtype in zip(ctx.saved_tensors, ctx.types, strict=True):
            scaled.append(None if gradient is None else (gradient * factor).to(dtype))
        return *scaled, None, None, None


def keep_mask(shape: torch.Size, p: float, device: torch.device) -> tuple[Tensor, float]:
    """Draws the mask of a dropout from torch's generator.

    Sixteen random bits decide about one element, which takes a quarter of the time of `torch.bernoulli`.

    Args:
        shape: Shape of the mask.
        p: Probability to drop an element, below 1, rounded to a multiple of 1/65536, at most 65535/65536.
        device: Device of the mask.

    Returns:
        The mask (1 for a kept element, 0 for a dropped element), as int8, which multiplies faster than bool; and the
        probability to keep an element.

    Example:
        >>> mask, keep = keep_mask(torch.Size([2, 3]), p=0.25, device=torch.device("cpu"))
        >>> mask.shape, mask.dtype, keep
        (torch.Size([2, 3]), torch.int8, 0.75)
    """
    level = min(round(p * _LEVELS), _LEVELS - 1)
    count = shape.numel()
    draws = torch.empty(-(-count // 4), dtype=torch.int64, device=device)  # four elements to a draw of 64 bits
    draws.random_(-(2**63), None)
    # Read as int16, random bits are a number from -2**15 on. So the threshold below is lower by half of the levels.
    bits = draws.view(torch.int16)[:count].view(shape)
    return bits.ge_(level - _LEVELS // 2).to(torch.int8), 1 - level / _LEVELS


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """Computes a frozen projection with a LoRA adapter: `x W + b + scaling * dropout(x) A^T B^T`.

    Products are computed in the type of the weight, or in float32 for float16 on a CPU. For the backward the function
    keeps one byte per element for the dropout, and a reference to the input. Projections of the same input share the
    memory of the input.

    Args:
        x: Input (..., I).
        weight: W (I, O), without a gradient.
        bias: b (O,), or None; without a gradient.
        down: A (R, I).
        up: B (O, R).
        scaling: Scaling of the adapter.
        dropout: Probability to drop an element of the adapter's input.

    Returns:
        The output (..., O), in the type of the weight.

    Example:
        >>> x = torch.ones(1, 2)
        >>> lora_linear(x, torch.eye(2), None, down=torch.ones(1, 2), up=torch.ones(2, 1), scaling=0.5)
        tensor([[2., 2.]])
    """
    output: Tensor = _LoraLinear.apply(x, weight, bias, down, up, scaling, dropout)  # type: ignore[no-untyped-call]
    return output


class _LoraLinear(torch.autograd.Function):
    """Autograd function of `lora_linear`.

    A product with the rank as a dimension of the result has the rank first: several times faster than the transposed
    product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        ctx.dtypes = x.dtype, down.dtype
        kind = _factor_type(weight)
        x = x.to(weight.dtype)
        down = down.to(kind)
        up = up.to(kind)
        if kind == weight.dtype:
            return _LoraLinear._project(ctx, x, weight, bias, down, up, scaling, dropout)
        with torch.autocast("cpu", enabled=False):  # autocast would compute the products in 16 bits
            output = _LoraLinear._project(ctx, x, weight, bias, down, up, scaling, dropout)
            return output.to(weight.dtype)

    @staticmethod
    def _project(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        rows = x.flatten(0, -2).to(down.dtype)
        wide = weight.to(down.dtype)
        output = product(rows, wide, None if bias is None else bias.to(wide.dtype))

        mask = None
        adapter_rows = rows
        if dropout:
            mask, keep = keep_mask(rows.shape, dropout, rows.device)
            # Dropout divides the kept elements by the probability to keep. Dividing the scaling instead saves a pass
            # over them.
            scaling /= keep
            # In place, in the memory of the converted mask.
            adapter_rows = mask.to(rows.dtype).mul_(rows)
        low = torch.mm(down, adapter_rows.t())
        output.addmm_(low.t(), up.t(), alpha=scaling)
        ctx.scaling = scaling
        # Only the gradient by A (`down`) reads the input.
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, mask, low, weight, down, up)
        shape = [*x.shape[:-1], output.shape[1]]
        # The library may add to the output in place, which torch forbids for a view that a function returns.
        return torch.ops.aten._unsafe_view(output, shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, low, weight, down, up = ctx.saved_tensors
        (gradient,) = gradients
        rows = gradient.flatten(0, -2).to(low.dtype)
        weight = weight.to(low.dtype)
        input_type, adapter_type = ctx.dtypes
        to_x, to_down, to_up = (ctx.needs_input_grad[place] for place in (0, 3, 4))
        for_x = for_down = for_up = None
        if to_up:
            by_rank = torch.mm(low, rows)
            for_up = by_rank.t().contiguous().to(adapter_type).mul_(ctx.scaling)
        if to_x or to_down:
            # The gradients by the input and by A share this product.
            back = torch.mm(up.t(), rows.t()).mul_(ctx.scaling)
            keep = None if mask is None else mask.to(rows.dtype)
        if to_x:
            for_x = torch.mm(back.t(), down)
            if keep is not None:
                # The mask belongs to the adapter's path alone, so the frozen projection's share is added after the
                # mask.
                for_x *= keep
            for_x += product(rows, weight.t())
            for_x = for_x.view(*gradient.shape[:-1], -1).to(input_type)
        if to_down:
            inputs = x.flatten(0, -2).to(low.dtype)
            if keep is not None:
                # In place: this is the last use of the mask.
                inputs = keep.mul_(inputs)
            for_down = torch.mm(back, inputs).to(adapter_type)
        return for_x, None, None, for_down, for_up, None, None
