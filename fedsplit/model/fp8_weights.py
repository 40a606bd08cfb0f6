"""Weights that a checkpoint keeps in float8, with a scale for each block of a matrix.

fedsplit computes with them in the type of the run, as transformers does where there is no GPU for float8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

SCALE = "_scale_inv"
"""End of the name of the scales that belong to a weight."""

METHOD = "fp8"
"""Name of this kind of weights in config.json."""

_WEIGHT = "weight"


def unscaled(weight: Tensor, scales: Tensor) -> Tensor:
    """Returns the values of a weight.

    Args:
        weight: Weight (out, in) in float8.
        scales: Scales in float32, one for each block of rows and columns.

    Raises:
        ValueError: The weight cannot be divided into as many blocks as there are scales.

    Example:
        >>> import torch
        >>> weight = torch.ones(2, 4).to(torch.float8_e4m3fn)
        >>> unscaled(weight, torch.tensor([[0.5, 2.0]]))[0]
        tensor([0.5000, 0.5000, 2.0000, 2.0000])
    """
    both = {_WEIGHT: [weight], f"{_WEIGHT}{SCALE}": [scales]}
    values: Tensor = Fp8Dequantize(None).convert(both)[_WEIGHT]
    return values


def without_float8(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the library's settings of quantisation, so that it computes as parts do: with unscaled weights.

    Args:
        settings: The `quantization_config` of config.json.

    Example:
        >>> without_float8({"quant_method": "fp8"})
        {'quant_method': 'fp8', 'dequantize': True}
    """
    return {**settings, "dequantize": True}
