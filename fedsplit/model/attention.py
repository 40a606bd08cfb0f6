"""Replaces two functions of the library by faster functions: 16-bit attention on a CPU, and an activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PretrainedConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Computes the library's attention; on a CPU always in float32.

    The backward pass of torch's 16-bit attention on a CPU takes twice as long.
    """
    if query.device.type != "cpu":
        return sdpa_attention_forward(module, query, key, value, *args, **options)
    wide = [tensor.float() for tensor in (query, key, value)]
    with torch.autocast("cpu", enabled=False):  # autocast would convert the float32 tensors back
        output, weights = sdpa_attention_forward(module, *wide, *args, **options)
    return output.to(query.dtype), weights


_WIDE = "fedsplit_wide"
"""Name of `_attention` in the library."""

AttentionInterface.register(_WIDE, _attention)
# For an attention without a mask function of the same name, the library makes no mask.
AttentionMaskInterface.register(_WIDE, sdpa_mask)


def use_tanh_gelu(config: PretrainedConfig) -> None:
    """Selects torch's tanh GELU, one fused function, in place of the library's formula in Python."""
    for key in ("activation_function", "hidden_act"):
        if getattr(config, key, None) == "gelu_new":
            setattr(config, key, "gelu_pytorch_tanh")


def use_float32_attention(config: PretrainedConfig, dtype: torch.dtype) -> None:
    """Selects float32 attention for a 16-bit model with torch's attention. Further models stay unchanged."""
    if dtype != torch.float32 and config._attn_implementation == "sdpa":
        config._attn_implementation = _WIDE
