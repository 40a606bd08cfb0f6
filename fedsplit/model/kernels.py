"""The costly functions of a step with fewer passes over memory: the loss, and a projection with its adapter.

The functions are the libraries'; only the order of sums differs. What a step does not need is not done:
nothing is computed for frozen weights, and nothing is kept for the backward that it can do without.

Shapes: N rows (tokens), D hidden, V vocabulary, I and O a projection's inputs and outputs, R an adapter's rank.
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
"""The label where no loss is wanted, as everywhere in torch."""

LOGITS = 2**23
"""Elements of the logits that exist at a time: more costs memory, fewer reads the head more often than it pays."""

_LEVELS = 2**16
_UNDERFLOW = 1e-30


def causal_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    cap: float | None = None,
    low: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """The mean next-token loss of a head without a bias, which may have an adapter, or learn itself.

    The logits exist a few rows at a time. Where gradients are wanted, they are computed on the way, so that the
    backward only scales them; positions without a label are left out from the beginning.

    Args:
        hidden: The head's input (B, T, D).
        head: The head's weight (V, D). Products are made in its type, the rest in float32.
        labels: The tokens themselves (B, T), `IGNORED` where no loss is wanted; they are shifted here.
        cap: Where logits are capped softly, what none of them exceeds.
        low: Of an adapter, its scaled s * A x (B, T, R); `low @ up.T` is added to the logits.
        up: Of an adapter, B (V, R).

    Returns:
        Nats, a scalar in float32; NaN where no position has a label.
    """
    wanted = labels[:, 1:].flatten()
    places = (wanted != IGNORED).nonzero().squeeze(1)
    # Rows of the unshifted hidden states: the last position of a sequence predicts nothing.
    length = labels.shape[1] - 1
    rows = places + places // max(length, 1)
    inputs = hidden.flatten(0, 1).index_select(0, rows)
    narrow = None if low is None else low.flatten(0, 1).index_select(0, rows)
    loss: Tensor = _Loss.apply(inputs, head, narrow, up, wanted[places], torch.is_grad_enabled(), cap)  # type: ignore[no-untyped-call]
    return loss


def _factor_type(weight: Tensor) -> torch.dtype:
    """The type in which products with a weight are made: its own, but for float16 on a CPU, which is slow at that."""
    return torch.float32 if weight.dtype == torch.float16 and weight.device.type == "cpu" else weight.dtype


def _bend(scores: Tensor, cap: float | None) -> Tensor | None:
    """Caps logits softly, in place; returns the derivative of that, or None where there is no cap."""
    if cap is None:
        return None
    slope = scores.div_(cap).tanh_().square().neg_().add_(1)
    scores.mul_(cap)
    return slope


class _Products:
    """Logits of some rows, `rows @ head.T` and what an adapter adds; and on the way back, the gradients wanted."""

    def __init__(
        self, rows: Tensor, head: Tensor, low: Tensor | None, up: Tensor | None, wanted: Sequence[bool]
    ) -> None:
        """Makes room.

        Args:
            rows: (N, D).
            head: (V, D).
            low: (N, R), or None.
            up: (V, R), or None.
            wanted: Which of these four take a gradient.
        """
        self._pairs = [(rows, head)] if low is None or up is None else [(rows, head), (low, up)]
        self._type = head.dtype
        self.gradients: list[Tensor | None] = [None] * 4
        for place, (left, right) in enumerate(self._pairs):
            if wanted[2 * place]:
                self.gradients[2 * place] = torch.empty_like(left, dtype=head.dtype)
            if wanted[2 * place + 1]:  # a sum over all rows, which a narrow type would round each time
                self.gradients[2 * place + 1] = torch.zeros_like(right, dtype=torch.float32)

    @property
    def any(self) -> bool:
        """Whether any gradient is wanted."""
        return any(gradient is not None for gradient in self.gradients)

    def logits(self, chosen: slice | Tensor, out: Tensor | None = None) -> Tensor:
        """Of the rows chosen (n, V), in `out` or not."""
        left, right = self._pairs[0]
        logits = product(left[chosen].to(self._type), right.t(), out=out)
        for left, right in self._pairs[1:]:
            logits.addmm_(left[chosen].to(self._type), right.to(self._type).t())
        return logits

    def back(self, chosen: slice, slopes: Tensor) -> None:
        """Takes the gradient by the logits (n, V) of some rows."""
        for place, (left, right) in enumerate(self._pairs):
            by_row, by_weight = self.gradients[2 * place], self.gradients[2 * place + 1]
            if by_row is not None:
                by_row[chosen] = product(slopes, right.to(self._type))
            if by_weight is not None:
                seen = left[chosen].to(self._type)
                if by_weight.dtype == slopes.dtype:
                    by_weight.addmm_(slopes.t(), seen)
                else:
                    by_weight += torch.mm(slopes.t(), seen)


class _Loss(torch.autograd.Function):
    """Rows (N, D), head (V, D), low (N, R), up (V, R), labels (N,) to the mean loss; keeps the gradients wanted."""

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
        count, size = len(rows), len(head)
        head = head.to(_factor_type(head))
        products = _Products(rows, head, low, up, [graph and need for need in ctx.needs_input_grad[:4]])
        nats = torch.zeros((), device=rows.device)
        step = -(-count // max(1, -(-count * size // LOGITS))) if count else 1
        # The same memory for every run of rows: fresh pages would cost as much as a pass over them.
        buffer = torch.empty(min(step, count), size, dtype=head.dtype, device=rows.device)
        wide = None if head.dtype == torch.float32 else torch.empty_like(buffer, dtype=torch.float32)
        for start in range(0, count, step):
            run, label = slice(start, start + step), labels[start : start + step]
            logits = products.logits(run, buffer[: len(label)])
            scores = logits if wide is None else wide[: len(label)].copy_(logits)
            slope = _bend(scores, cap)
            if not products.any:
                nats += functional.cross_entropy(scores, label, reduction="sum")
                continue
            torch.softmax(scores, -1, out=scores)
            chosen = scores.gather(1, label[:, None])
            lost = (chosen < _UNDERFLOW).squeeze(1)
            if lost.any():
                again = products.logits(start + lost.nonzero().squeeze(1)).float()
                _bend(again, cap)
                nats += functional.cross_entropy(again, label[lost], reduction="sum")
            nats -= chosen[~lost].log().sum()
            scores.scatter_(1, label[:, None], chosen - 1)
            if slope is not None:
                scores.mul_(slope)
            if scores is not logits:
                logits.copy_(scores)
            products.back(run, logits)
            del logits, scores  # or they would be there beside the next ones
        ctx.count = count
        ctx.types = [None if tensor is None else tensor.dtype for tensor in (rows, head, low, up)]
        ctx.save_for_backward(*products.gradients)
        return nats / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        factor = gradients[0] / max(ctx.count, 1)
        kept = zip(ctx.saved_tensors, ctx.types, strict=True)
        scaled = [None if gradient is None else (gradient * factor).to(dtype) for gradient, dtype in kept]
        return *scaled, None, None, None


def keep_mask(shape: torch.Size, p: float, device: torch.device) -> tuple[Tensor, float]:
    """Draws what a dropout keeps, from torch's generator.

    Sixteen random bits decide over an element, a quarter of what `torch.bernoulli` takes the time for.

    Args:
        shape: The shape of what is to be dropped from.
        p: The probability to drop, below 1; made a multiple of 1/65536, at most 65535 of them.
        device: Where to.

    Returns:
        1 where an element is kept and 0 elsewhere, as int8 (which multiplies faster than bool); the
        probability to keep.
    """
    level = min(round(p * _LEVELS), _LEVELS - 1)
    words = torch.empty(-(-shape.numel() // 4), dtype=torch.int64, device=device).random_(-(2**63), None)
    bits = words.view(torch.int16)[: shape.numel()].view(shape)
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
    """A frozen projection with a LoRA adapter, `x W + b + scaling * dropout(x) A^T B^T`.

    Products are made in the type of the weight, or in float32 where that is float16 on a CPU. Of the dropout a byte an
    element is kept for the backward; the input is kept as it is, so that it is kept once, however many projections
    read it.

    Args:
        x: (..., I).
        weight: W (I, O); gets no gradient.
        bias: b (O,), or None; gets no gradient.
        down: A (R, I).
        up: B (O, R).
        scaling: The adapter's.
        dropout: The probability to drop an element of the adapter's input.

    Returns:
        (..., O), in the type of the weight.
    """
    output: Tensor = _LoraLinear.apply(x, weight, bias, down, up, scaling, dropout)  # type: ignore[no-untyped-call]
    return output


class _LoraLinear(torch.autograd.Function):
    """See `lora_linear`.

    Products with one side as narrow as a rank are written such that the rank comes first in the result: that
    is several times faster than the other way round.
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
        x, down, up = x.to(weight.dtype), down.to(kind), up.to(kind)
        if kind == weight.dtype:
            return _LoraLinear._project(ctx, x, weight, bias, down, up, scaling, dropout)
        with torch.autocast("cpu", enabled=False):  # which would narrow the products again
            return _LoraLinear._project(ctx, x, weight, bias, down, up, scaling, dropout).to(weight.dtype)

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
        rows, wide = x.flatten(0, -2).to(down.dtype), weight.to(down.dtype)
        mask = None
        if dropout:
            mask, keep = keep_mask(rows.shape, dropout, rows.device)
            scaling /= keep
        output = product(rows, wide, None if bias is None else bias.to(wide.dtype))
        low = torch.mm(down, (rows if mask is None else mask.to(rows.dtype).mul_(rows)).t())
        output.addmm_(low.t(), up.t(), alpha=scaling)
        ctx.scaling = scaling
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, mask, low, weight, down, up)
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, low, weight, down, up = ctx.saved_tensors
        (gradient,) = gradients
        rows, weight = gradient.flatten(0, -2).to(low.dtype), weight.to(low.dtype)
        input_type, adapter_type = ctx.dtypes
        to_x, to_down, to_up = (ctx.needs_input_grad[place] for place in (0, 3, 4))
        for_x = for_down = for_up = None
        if to_up:
            for_up = torch.mm(low, rows).t().contiguous().to(adapter_type).mul_(ctx.scaling)
        if to_x or to_down:
            back = torch.mm(up.t(), rows.t()).mul_(ctx.scaling)
            kept = None if mask is None else mask.to(rows.dtype)
        if to_x:
            for_x = torch.mm(back.t(), down)
            if kept is not None:
                for_x *= kept
            for_x += product(rows, weight.t())
            for_x = for_x.view(*gradient.shape[:-1], -1).to(input_type)
        if to_down:
            seen = x.flatten(0, -2).to(low.dtype)
            for_down = torch.mm(back, seen if kept is None else kept.mul_(seen)).to(adapter_type)
        return for_x, None, None, for_down, for_up, None, None
