"""What of the library's own computation is replaced by torch's faster one: attention's type, and an activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **how: Any) -> Any:
    """The library's attention, on a CPU in float32 always: torch's backward of a narrower one takes twice as long."""
    if query.device.type != "cpu":
        return sdpa_attention_forward(module, query, key, value, *rest, **how)
    with torch.autocast("cpu", enabled=False):
        output, weights = sdpa_attention_forward(module, query.float(), key.float(), value.float(), *rest, **how)
    return output.to(query.dtype), weights


_WIDE = "fedsplit_wide"
AttentionInterface.register(_WIDE, _attention)
AttentionMaskInterface.register(_WIDE, sdpa_mask)


def use_tanh_gelu(config: Any) -> None:
    """Chooses torch's own functions for what the library spells out."""
    for key in ("activation_function", "hidden_act"):
        if getattr(config, key, None) == "gelu_new":
            setattr(config, key, "gelu_pytorch_tanh")


def use_float32_attention(config: Any, dtype: torch.dtype) -> None:
    """Chooses the type that torch's attention is fastest in; a family without it keeps the library's choice."""
    if dtype != torch.float32 and config._attn_implementation == "sdpa":
        config._attn_implementation = _WIDE
