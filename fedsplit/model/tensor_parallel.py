"""Tensor parallelism: several processes, each with a piece of every projection of a part (Megatron-LM, 1909.08053).

transformers' plan for the model class names the projections and how each is cut:

- **Columns.** A process has some rows of the weight (out, in), and computes some of the outputs. Its input is whole.
- **Rows.** A process has some columns of the weight, and some of the inputs. The outputs of all processes are added.

All other modules of a block, such as norms, are whole in every process and compute the same everywhere. Of the factors
of a LoRA adapter, the one at the side that is cut is cut, too: B under columns, A under rows. The gradients of whole
factors differ between the processes, and their sum is the gradient.

transformers' and PEFT's own tensor parallelism is not used: with transformers 5.23 and PEFT 0.21 the backward through a
LoRA adapter on a projection that is cut by rows fails.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsplit.errors import SettingError
from fedsplit.model.kernels import keep_mask
from fedsplit.model.parts import Part
from fedsplit.model.process_group import ProcessGroup, Shard

SETTING = "trunk.tensor_parallel"

COLUMNS = ("colwise", "colwise_gather_output")
"""Styles of transformers' plans that cut a projection by columns; the second with an output that is joined."""

ROWS = ("rowwise", "rowwise_split_input")
"""Styles that cut a projection by rows; the second with an input that is whole."""

_FROZEN = ("replicated_with_grad_allreduce",)
"""Styles of modules that are whole everywhere. They concern the gradients of base weights, which are frozen here."""


_ATTENTION = re.compile(r"\.(self_attn|attention)\.")
"""Part of the name of a projection inside an attention."""


def styles_of(part: Part, size: int) -> dict[str, str]:
    """Returns the style of every projection of a part that is cut, by the name of the projection in the part.

    Args:
        part: The part, without adapters. Its weights may be on the meta device.
        size: Number of processes.

    Raises:
        SettingError: transformers has no plan for the model class, or a plan with further styles.

    Example:
        >>> from fedsplit.model.split import empty_part
        >>> from fedsplit.settings.config import BUNDLED_MODEL
        >>> styles_of(empty_part(BUNDLED_MODEL, (1, 5), "trunk", torch.float32, fused=False, classes=0), size=2)
        Traceback (most recent call last):
        fedsplit.errors.SettingError: trunk.tensor_parallel: 2 is not possible; allowed: 1 for a model of type gpt2, \
for which transformers has no plan of tensor parallelism
    """
    kind = part.config.model_type
    plan: Mapping[str, str] = part.config.base_model_tp_plan or {}
    if not plan:
        words = f"1 for a model of type {kind}, for which transformers has no plan of tensor parallelism"
        raise SettingError(SETTING, size, words)
    further = sorted({*plan.values()} - {*COLUMNS, *ROWS, *_FROZEN})
    if further:
        words = f"1 for a model of type {kind}, whose experts would have to be cut ({', '.join(further)})"
        raise SettingError(SETTING, size, words)
    styles = {}
    for name, module in part.named_modules():
        # The plan has the names inside the decoder, with `*` for the number of a block.
        pattern = re.sub(r"\.\d+\.", ".*.", name.removeprefix(f"{part.family.decoder}."), count=1)
        style = plan.get(pattern)
        if type(module) is nn.Linear and style in (*COLUMNS, *ROWS):
            styles[name] = style
    return styles


def check_sizes(part: Part, size: int) -> None:
    """Checks that every projection, and the attention, can be cut into equal pieces.

    Args:
        part: The part. Its weights may be on the meta device.
        size: Number of processes.

    Raises:
        SettingError: The model cannot be cut, as for `styles_of`, or not into as many pieces.
    """
    styles = styles_of(part, size)
    config = part.config
    # Where the outputs are joined, every process computes all heads.
    if any(style == "colwise" and _ATTENTION.search(name) for name, style in styles.items()):
        for key in ("num_attention_heads", "num_key_value_heads"):
            heads = getattr(config, key, size)
            if heads % size:
                raise SettingError(SETTING, size, f"a divisor of {heads}, the {key} of the model")
        if getattr(config, "attention_dropout", 0.0):
            words = "1 for a model with attention_dropout in its config.json: processes would drop the same places"
            raise SettingError(SETTING, size, words)
    for name, style in styles.items():
        length = part.get_parameter(f"{name}.weight").shape[cut_dimension(style)]
        if length % size:
            raise SettingError(
                SETTING, size, f"a divisor of {length}, the width at which {part.unsplit_name(name)} is cut"
            )


def cut_dimension(style: str) -> int:
    """Returns the dimension at which a weight (out, in) is cut."""
    return 0 if style in COLUMNS else 1


def cut_of_factor(name: str, styles: Mapping[str, str]) -> int | None:
    """Returns the dimension at which a factor of a LoRA adapter is cut.

    Args:
        name: Name of the factor in the part.
        styles: Result of `styles_of`.

    Returns:
        The dimension; None for a factor that is whole in every process.

    Example:
        >>> styles = {"mlp.up_proj": "colwise", "mlp.down_proj": "rowwise"}
        >>> cut_of_factor("mlp.up_proj.lora_B.default.weight", styles)
        0
        >>> cut_of_factor("mlp.up_proj.lora_A.default.weight", styles) is None
        True
        >>> cut_of_factor("mlp.down_proj.lora_A.default.weight", styles)
        1
    """
    layer, _, rest = name.partition(".lora_")
    is_down = rest.startswith("A.")
    if styles[layer] in COLUMNS:
        return None if is_down else 0
    return 1 if is_down else None


def connect(part: Part, styles: Mapping[str, str], group: ProcessGroup) -> None:
    """Makes the pieces of a part's projections compute together, in place.

    Args:
        part: The part, with its own pieces, and with adapters.
        styles: Result of `styles_of`, before adapters were added.
        group: The processes.
    """
    crossing = _Crossing(group)
    for name, style in styles.items():
        module = part.get_submodule(name)
        if style in COLUMNS:
            module.register_forward_pre_hook(crossing.enter)
            if style == "colwise_gather_output":
                module.register_forward_hook(crossing.join)
        else:
            if style == "rowwise_split_input":
                module.register_forward_pre_hook(crossing.split)
            module.register_forward_hook(crossing.leave)
            _drop_alike(module, group.shard, part.fused)


class _Crossing:
    """Hooks where tensors cross between what is whole in every process and what is cut."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        # Projections of the same input enter together, so that the backward sums once. The memory ends with the block
        # half: a tensor that was kept longer would keep the graph alive.
        self._entered: tuple[Tensor, Tensor] | None = None

    def enter(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        whole, *rest = inputs
        if self._entered is None or self._entered[0] is not whole:
            self._entered = (whole, _Enter.apply(whole, self._group))  # type: ignore[no-untyped-call]
        return self._entered[1], *rest

    def leave(self, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        self._entered = None
        total: Tensor = _Sum.apply(output, self._group)  # type: ignore[no-untyped-call]
        return total

    def join(self, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        self._entered = None
        whole: Tensor = _Join.apply(output, self._group)  # type: ignore[no-untyped-call]
        return whole

    def split(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        whole, *rest = inputs
        return _Split.apply(whole, self._group), *rest  # type: ignore[no-untyped-call]


class _Enter(torch.autograd.Function):
    """From whole to cut: every process has the tensor; its gradient is the sum over the processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.group.summed(gradients[0]), None


class _Sum(torch.autograd.Function):
    """From cut to whole: the sum over the processes; every process has the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return group.summed(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None


class _Join(torch.autograd.Function):
    """From pieces (..., W) to the whole (..., N * W), with which every process goes on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.shard = group.shard
        return group.joined(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0]
        place = ctx.shard.of(gradient.shape[-1])
        return gradient[..., place], None


class _Split(torch.autograd.Function):
    """From a whole (..., N * W) that every process has to the own piece (..., W)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x[..., group.shard.of(x.shape[-1])].clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.group.joined(gradients[0]), None


def _drop_alike(module: nn.Module, shard: Shard, fused: bool) -> None:
    """Makes the dropout before an adapter that is cut by rows draw what it would draw in one process."""
    dropouts = getattr(module, "lora_dropout", {})
    for name, dropout in dropouts.items():
        if isinstance(dropout, nn.Dropout):
            dropouts[name] = PieceDropout(dropout.p, shard, fused).train(dropout.training)


class PieceDropout(nn.Module):
    """Dropout of a piece of the inputs. The mask of the whole inputs is drawn, so that the pieces' masks differ."""

    def __init__(self, p: float, shard: Shard, fused: bool) -> None:
        """Takes over a dropout.

        Args:
            p: Probability to drop an element.
            shard: Place of this process.
            fused: True to draw as `fedsplit.model.kernels` does, False to draw as torch does.
        """
        super().__init__()
        self.p = p
        self._shard = shard
        self._fused = fused

    def forward(self, x: Tensor) -> Tensor:
        """Returns the piece (..., W) with some elements set to zero, and the rest scaled up."""
        if not self.training:
            return x
        width = x.shape[-1] * self._shard.size
        shape = torch.Size([*x.shape[:-1], width])
        if self._fused:
            mask, keep = keep_mask(shape, self.p, x.device)
            scaled = mask.to(x.dtype) / keep
        else:
            ones = torch.ones(shape, dtype=x.dtype, device=x.device)
            scaled = functional.dropout(ones, self.p)
        return x * scaled[..., self._shard.of(width)]
