"""Base weights in 4 or 8 bits, by bitsandbytes: QLoRA's NF4 (2305.14314) and LLM.int8 (2208.07339).

Only projections inside blocks are quantised; embeddings, norms, the head, and experts whose matrices are stacked in
one parameter stay as they are. In 4 bits a weight is decoded to the type of computation whenever it is used, and
constants of the blocks of 64 weights are quantised, too; in 8 bits every row of a weight has a constant. In 8 bits on
a GPU the inputs of a projection are quantised as well, but for outliers above 6; on a CPU the weight is decoded.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedsplit.allowed import SettingError
from fedsplit.config import Config
from fedsplit.model.devices import CPU, TYPES, resolve

EXTRA = "fedsplit[quantized]"
"""What to install."""

OUTLIERS = 6.0
"""Inputs above this are not quantised, in 8 bits."""

_MARK = "stood_transposed"
"""Quantised projections have this: whether the one that they stand for stores (in, out)."""


def _library() -> Any:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of every rounding, at every step
    import bitsandbytes

    return bitsandbytes


@functools.cache
def _steady() -> Any:
    """The library's layer of 8 bits, which on a CPU multiplies by other rules in training than in evaluation.

    What is evaluated must be what is trained; it takes itself to be in training always, where the library decodes the
    weight and quantises no inputs.
    """

    class Steady(_library().nn.Linear8bitLt):  # type: ignore[misc]  # the library has no types
        def train(self, mode: bool = True) -> Any:
            return self

    return Steady


def check_quantization(config: Config) -> None:
    """Makes sure that weights can be quantised as a run asks, by doing it to a small one.

    Raises:
        SettingError: The library is not there, or cannot do it on the device.
    """
    if config.bits and importlib.util.find_spec("bitsandbytes") is None:
        words = f"none without bitsandbytes, which is not installed: pip install '{EXTRA}'"
        raise SettingError("quantization", config.quantization, words)
    for part, bits in config.bits.items():
        device = resolve(config.device_of(part))
        try:
            _try(bits, TYPES[config.dtype], device)
        except Exception as error:  # noqa: BLE001  # whatever a library without a kernel raises
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            words = f"parts on a device for which bitsandbytes has kernels ({device}: {reason})"
            raise SettingError("quantization", f"{part}:{bits}", words) from None


def _try(bits: int, dtype: torch.dtype, device: torch.device) -> None:
    """A step of a small projection."""
    layer = nn.Linear(64, 64, dtype=dtype).requires_grad_(False)
    x = torch.ones(2, 64, dtype=dtype, device=device, requires_grad=True)
    quantize(layer, bits, dtype, device)(x).sum().backward()


def quantize(module: nn.Module, bits: int, dtype: torch.dtype, device: torch.device = CPU) -> nn.Module:
    """A projection with a quantised weight, in which PEFT knows its way.

    Args:
        module: A frozen `nn.Linear`, or a `Conv1D`, whose weight is transposed for this.
        bits: 4 or 8.
        dtype: The type of computation.
        device: Where to.
    """
    library = _library()
    transposed = not isinstance(module, nn.Linear)
    weight: Tensor = module.weight.detach().t() if transposed else module.weight.detach()  # type: ignore[operator]
    (rows, columns), biased = weight.shape, module.bias is not None
    with torch.device("meta"):
        if bits == 4:
            made = library.nn.Linear4bit(columns, rows, biased, compute_dtype=dtype, quant_type="nf4")
            # On some CPUs it would pack the weight anew for evaluation, in bfloat16, and go on training without a
            # gradient by the input.
            made.support_avx512bf16_for_cpu = False
        else:
            made = _steady()(columns, rows, biased, has_fp16_weights=False, threshold=OUTLIERS)
    kind = library.nn.Params4bit if bits == 4 else library.nn.Int8Params
    how = {"compress_statistics": True, "quant_type": "nf4", "module": made} if bits == 4 else {}
    # From the CPU: only on the way from there to a device is a weight of 8 bits quantised.
    made.weight = kind(weight.cpu().contiguous(), requires_grad=False, **how).to(device)
    made.bias = module.bias
    setattr(made, _MARK, transposed)
    return made


def dequantize(module: nn.Module) -> Tensor:
    """The weight (out, in) that a quantised projection computes with, in float32."""
    functional, weight = _library().functional, cast(Any, module.weight)
    if hasattr(weight, "quant_state"):
        return functional.dequantize_4bit(weight.data, weight.quant_state).float()
    scale = weight.SCB if weight.SCB is not None else cast(Any, module.state).SCB  # the first forward moves it
    return functional.int8_vectorwise_dequant(weight.data, scale).float()


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a projection that `quantized` made."""
    return hasattr(module, _MARK)


def was_transposed(module: nn.Module) -> bool:
    """Whether a quantised projection stands for one that stores (in, out)."""
    return bool(getattr(module, _MARK, False))


def values_in(parameter: Tensor) -> int:
    """How many weights a parameter stands for; two of 4 bits are kept in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def mark_quantized(model: Any, bits: Iterable[int]) -> Any:
    """A model that says what is quantised in it, as PEFT asks."""
    for number in bits:
        setattr(model, f"is_loaded_in_{number}bit", True)
    return model
