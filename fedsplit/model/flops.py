"""Floating-point operations of a part's forward and backward, from the shapes of its weights alone.

Only matrix products count, as is usual: a product of (N, I) and (I, O) takes 2 N I O operations. Norms, activations,
softmax, dropout and the scan of a state-space model are left out.

- **Weights.** Every token is multiplied by every matrix of a block, of an adapter and of the head. In a mixture of
  experts, a token passes through the chosen experts alone. Embeddings are looked up, and cost nothing.
- **Attention.** Scores and values are counted over all pairs of positions, masked pairs included.
- **Backward.** A frozen matrix takes one product, for the gradient by its input. A trained one takes a second, for its
  own gradient. Modules before the first trained one take none, unless the part's input needs a gradient. The backward
  of attention takes 2.5 times its forward, since torch's kernels compute the scores again. In the first trained block
  of a bottom, an MLP counts as behind the attention; where both read the same input, this is too much.

Shapes: B sequences of T tokens, I and O inputs and outputs of a projection, N rows (tokens).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from fedsplit.model.families import STACKED
from fedsplit.model.parts import SCORE, Part

ATTENTION_BACKWARD = 2.5
"""Operations of the backward of attention, as a multiple of those of its forward."""

_CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_k", "experts_per_token", "top_k_experts")
"""Names of the number of experts for a token, in the library's configurations."""

_ATTENTION = re.compile(r"Attention$|Attn$")
"""Matches names of classes whose cost grows with the square of the length."""

_ADAPTER = re.compile(r"\.(base_layer|lora_[A-Za-z]+|[a-z0-9]+_[A-Za-z]+\.default)(\.|$)")
"""Matches the place in a name where PEFT's layer around a projection begins."""


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one batch.

    Attributes:
        forward: Operations of the forward.
        backward: Operations of the backward.

    Example:
        >>> Flops(2.0, 3.0) + Flops(1.0, 1.0)
        Flops(forward=3.0, backward=4.0)
    """

    forward: float = 0.0
    backward: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        """Returns the operations of both."""
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def times(self, count: float) -> Flops:
        """Returns the operations of `count` batches."""
        return Flops(self.forward * count, self.backward * count)

    @property
    def total(self) -> float:
        """Operations of forward and backward together."""
        return self.forward + self.backward


@dataclass(frozen=True)
class _Matrix:
    """A matrix that every token is multiplied by.

    Attributes:
        operations: Operations of the product for one token.
        is_trained: True if the matrix gets a gradient.
    """

    operations: float
    is_trained: bool


_Projection = list[_Matrix]
"""The matrices of a projection: its weight, and then those of its adapter."""


def flops_of(
    part: Part,
    rows: int,
    length: int,
    input_needs_gradient: bool | None = None,
) -> Flops:
    """Returns the operations of a part for a batch of a training step. An evaluation takes the forward alone.

    The weights may be on any device, also on the meta device: only shapes are read.

    Args:
        part: Bottom, trunk or top, with adapters.
        rows: Sequences B of the batch.
        length: Tokens T of a sequence, without virtual tokens.
        input_needs_gradient: True if the backward goes on below the part. None for the usual case: False for the
            bottom, whose input is tokens, and True for trunk and top.

    Example:
        >>> from fedsplit.adaptation.run_adapters import outlined
        >>> from fedsplit.settings.config import Config
        >>> cost = flops_of(outlined(Config(), "trunk"), rows=4, length=128)  # GPT-2's shape, 4 blocks of width 128
        >>> cost.forward / 1e6, cost.backward / 1e6
        (1006.63296, 1275.068416)
    """
    needs = part.kind != "bottom" if input_needs_gradient is None else input_needs_gradient
    total = sum(flops_by_block(part, rows, length, needs), Flops())
    return total + head_flops(part, rows, length, needs)


def flops_by_block(part: Part, rows: int, length: int, input_needs_gradient: bool) -> list[Flops]:
    """Returns the operations of each block of a part, for a batch of a training step.

    Args:
        part: The part, with adapters.
        rows: Sequences B of the batch.
        length: Tokens T of a sequence, without virtual tokens.
        input_needs_gradient: True if the backward goes on below the part.

    Example:
        >>> from fedsplit.adaptation.run_adapters import outlined
        >>> from fedsplit.settings.config import Config
        >>> first, second = flops_by_block(outlined(Config(cut="2:5"), "bottom"), 4, 128, input_needs_gradient=False)
        >>> first.backward < second.backward  # tokens need no gradient
        True
    """
    needs = input_needs_gradient or part.virtual > 0  # virtual tokens are trained, at the bottom's input
    positions = length + part.virtual
    tokens = rows * positions
    pairs = tokens * (part.ahead + positions)
    batch = _Batch(tokens, pairs, has_trained_past=part.ahead > 0)
    costs = []
    for block in getattr(part.decoder, part.family.blocks):
        cost, needs = _of_block(block, part.config, batch, needs)
        costs.append(cost)
    return costs


@dataclass(frozen=True)
class _Batch:
    """Size of a batch.

    Attributes:
        tokens: Number of tokens.
        pairs: Number of pairs of positions, over all sequences.
        has_trained_past: True if keys and values before the text are trained.
    """

    tokens: int
    pairs: int
    has_trained_past: bool


def _of_block(
    block: nn.Module,
    config: Any,
    batch: _Batch,
    needs: bool,
) -> tuple[Flops, bool]:
    """Returns the operations of a block, and whether its output needs a gradient.

    Args:
        block: The block, with adapters.
        config: Configuration of the part.
        batch: Size of the batch.
        needs: True if the block's input needs a gradient.
    """
    total = Flops()
    for parent, projections in _by_parent(block, config).items():
        # Of a module such as an attention, all projections but the last read the module's input.
        count = max(1, len(projections) - 1)
        entries, exits = projections[:count], projections[count:]
        for projection in entries:
            total += _of_projection(projection, needs).times(batch.tokens)
        needs = needs or any(map(_is_trained, entries))
        if _ATTENTION.search(type(block.get_submodule(parent)).__name__):
            needs = needs or batch.has_trained_past
            attention = _of_attention(config) * batch.pairs
            total += Flops(attention, ATTENTION_BACKWARD * attention * needs)
        for projection in exits:
            total += _of_projection(projection, needs).times(batch.tokens)
        needs = needs or any(map(_is_trained, exits))
    return total, needs


def _is_trained(projection: _Projection) -> bool:
    """Returns True if a matrix of a projection gets a gradient."""
    return any(matrix.is_trained for matrix in projection)


def _of_projection(projection: _Projection, needs: bool) -> Flops:
    """Returns the operations of a projection and its adapter for one token.

    Args:
        projection: Its matrices.
        needs: True if the projection's input needs a gradient.
    """
    forward = backward = 0.0
    for matrix in projection:
        forward += matrix.operations
        backward += matrix.operations * (needs + matrix.is_trained)
        needs = needs or matrix.is_trained  # the adapter's second factor reads the output of the first
    return Flops(forward, backward)


def _by_parent(block: nn.Module, config: Any) -> dict[str, list[_Projection]]:
    """Returns the projections of a block by the name of the module that they lie in, in the order of computation.

    Args:
        block: The block, with adapters.
        config: Configuration of the part.
    """
    groups: dict[str, dict[str, _Projection]] = {}
    embeddings = {f"{name}." for name, module in block.named_modules() if isinstance(module, nn.Embedding)}
    for name, parameter in block.named_parameters():
        if parameter.ndim < 2 or name.startswith(tuple(embeddings)):
            continue
        module = name.rpartition(".")[0]
        begins = _ADAPTER.search(module)
        projection = module[: begins.start()] if begins else module
        operations = 2.0 * parameter.numel() * _used_share(name, parameter.shape, config)
        parent = projection.rpartition(".")[0]
        matrices = groups.setdefault(parent, {}).setdefault(projection, [])
        matrices.append(_Matrix(operations, parameter.requires_grad))
    return {parent: list(group.values()) for parent, group in groups.items()}


def _used_share(name: str, shape: Any, config: Any) -> float:
    """Returns the share of a parameter that one token is multiplied by: below 1 for the experts of a mixture.

    Args:
        name: Name of the parameter inside a block.
        shape: Shape of the parameter.
        config: Configuration of the part.
    """
    is_stacked = "experts" in name and any(f".{last}" in name for last in STACKED) and len(shape) == 3
    if not is_stacked:
        return 1.0
    numbers = (getattr(config, key, None) for key in _CHOSEN)
    chosen = next((number for number in numbers if number), shape[0])
    return min(1.0, float(chosen) / float(shape[0]))


def _of_attention(config: Any) -> float:
    """Returns the operations of attention for one pair of positions, over all heads."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    # Of latent attention, queries and keys are wider than values.
    keys = getattr(config, "qk_head_dim", None) or width
    values = getattr(config, "v_head_dim", None) or width
    return 2.0 * float(heads) * float(keys + values)


def head_flops(part: Part, rows: int, length: int, input_needs_gradient: bool = True) -> Flops:
    """Returns the operations of the head for a batch; none for a part without a head.

    Args:
        part: The part.
        rows: Sequences of the batch.
        length: Tokens of a sequence, without virtual tokens.
        input_needs_gradient: True if the head's input needs a gradient.
    """
    if part.kind != "top":
        return Flops()
    is_classifier = hasattr(part, SCORE)
    head = part.get_submodule(SCORE if is_classifier else "lm_head")
    matrices = []
    for parameter in head.parameters():
        if parameter.ndim >= 2:
            matrices.append(_Matrix(2.0 * parameter.numel(), parameter.requires_grad))
    # The fused loss leaves out the last position, which predicts nothing.
    is_fused = part.fused and part.family.plain_head and not is_classifier
    # With virtual tokens before the text, the last virtual token predicts the first token of the text.
    predicted = length - 1 + min(part.virtual, 1) if is_fused else length + part.virtual
    return _of_projection(matrices, input_needs_gradient).times(rows * predicted)
