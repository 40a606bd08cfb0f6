"""Base weights in 4 or 8 bits, by bitsandbytes: QLoRA's NF4 (2305.14314) and LLM.int8 (2208.07339).

Only projections inside blocks are quantised. The types of embeddings, norms, the head, and experts with stacked
matrices stay unchanged.

- 4 bits: each block of 64 weights has a scale, and the scales are quantised, too. A weight is decoded at each use.
- 8 bits: each row of a weight has a scale. On a GPU the inputs of a projection are quantised as well, except for
  outliers above 6. On a CPU the weight is decoded at each use.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
from collections.abc import Collection, Iterable
from types import ModuleType
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from fedsplit.errors import SettingError, first_line
from fedsplit.model.devices import CPU, TYPES, resolve
from fedsplit.model.stored_bits import PackedWeight
from fedsplit.settings.config import Config

Model = TypeVar("Model", bound=nn.Module)

EXTRA = "fedsplit[quantized]"
"""Extra of the package fedsplit, with bitsandbytes."""

OUTLIERS = 6.0
"""Inputs above this value are not quantised (8 bits on a GPU)."""

_MARK = "stood_transposed"
"""Attribute of every quantised projection: True if the original projection stores its weight as (in, out)."""


def _library() -> ModuleType:
    """Imports bitsandbytes, an optional dependency."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # the library warns at every step
    import bitsandbytes

    return bitsandbytes


@functools.cache
def _steady() -> type[nn.Module]:
    """Returns a variant of the library's 8-bit layer that computes alike in training and in evaluation.

    On a CPU the library's layer quantises inputs in evaluation mode only, so that the evaluated model would differ from
    the trained model. The variant always stays in training mode, where the weight is decoded.
    """

    class Steady(_library().nn.Linear8bitLt):  # type: ignore[misc]  # the library has no types
        def train(self, mode: bool = True) -> Self:
            return self

    return Steady


def check_quantization(config: Config) -> None:
    """Checks that the weights of a run can be quantised, by quantising a small projection on each part's device.

    Raises:
        SettingError: bitsandbytes is not installed, or has no kernel for the device.
    """
    if config.bits and importlib.util.find_spec("bitsandbytes") is None:
        words = f"none without bitsandbytes, which is not installed: pip install '{EXTRA}'"
        raise SettingError("quantization", config.quantization, words)
    for part, bits in config.bits.items():
        device = resolve(config.device_of(part))
        try:
            _try(bits, TYPES[config.dtype], device)
        except Exception as error:  # noqa: BLE001  # bitsandbytes raises many kinds where it has no kernel
            words = f"parts on a device for which bitsandbytes has kernels ({device}: {first_line(error)})"
            raise SettingError("quantization", f"{part}:{bits}", words) from None


def _try(bits: int, dtype: torch.dtype, device: torch.device) -> None:
    """Makes a forward and a backward through a small quantised projection."""
    layer = nn.Linear(64, 64, dtype=dtype).requires_grad_(False)
    x = torch.ones(2, 64, dtype=dtype, device=device, requires_grad=True)
    quantize(layer, bits, dtype, device)(x).sum().backward()


def quantize(
    module: nn.Module,
    bits: int,
    dtype: torch.dtype,
    device: torch.device = CPU,
) -> nn.Module:
    """Returns a copy of a projection with a quantised weight, as a layer that PEFT can adapt.

    Args:
        module: A frozen `nn.Linear` or `Conv1D`. The weight of a `Conv1D` is transposed.
        bits: 4 or 8.
        dtype: Type of computation.
        device: Device of the copy.
    """
    library = _library()
    transposed = not isinstance(module, nn.Linear)
    weight: Tensor = module.weight.detach().t() if transposed else module.weight.detach()  # type: ignore[operator]
    projection = _empty_projection(module, bits, dtype, "nf4")
    # The library quantises an 8-bit weight only when it moves from the CPU to a device.
    source = weight.cpu().contiguous()
    if bits == 4:
        options = {"compress_statistics": True, "quant_type": "nf4", "module": projection}
        projection.weight = library.nn.Params4bit(source, requires_grad=False, **options).to(device)
    else:
        projection.weight = library.nn.Int8Params(source, requires_grad=False).to(device)
    projection.bias = module.bias
    return projection


def _empty_projection(
    module: nn.Module,
    bits: int,
    dtype: torch.dtype,
    kind: str,
) -> Any:
    """Returns a quantised projection without values.

    Args:
        module: The `nn.Linear` or `Conv1D` for which the projection stands.
        bits: 4 or 8.
        dtype: Type of computation.
        kind: Kind of the codes of 4-bit weights.
    """
    library = _library()
    transposed = not isinstance(module, nn.Linear)
    sizes = cast(Tensor, module.weight).shape
    rows, columns = reversed(sizes) if transposed else sizes
    biased = module.bias is not None
    # Without memory for weights that the callers replace.
    with torch.device("meta"):
        if bits == 4:
            projection = library.nn.Linear4bit(columns, rows, biased, compute_dtype=dtype, quant_type=kind)
        else:
            projection = _steady()(columns, rows, biased, has_fp16_weights=False, threshold=OUTLIERS)
    _settle(projection)
    setattr(projection, _MARK, transposed)
    return projection


def _settle(projection: Any) -> None:
    """Keeps a quantised projection from computing otherwise in evaluation than in training.

    On some CPUs the library would repack a 4-bit weight in bfloat16 for evaluation. Training after that would give no
    gradient by the input.
    """
    if isinstance(projection, _library().nn.Linear4bit):
        projection.support_avx512bf16_for_cpu = False
    else:
        projection.__class__ = _steady()
        projection.training = True  # and so it stays


def restore(
    module: nn.Module,
    packed: PackedWeight,
    dtype: torch.dtype,
    device: torch.device = CPU,
) -> nn.Module:
    """Returns a projection with a weight that a checkpoint keeps quantised. Nothing is rounded anew.

    Args:
        module: The frozen `nn.Linear` or `Conv1D` for which the projection stands; its weight has no values.
        packed: The weight, as the library stores it.
        dtype: Type of computation.
        device: Device of the projection.
    """
    library = _library()
    projection = _empty_projection(module, packed.bits, dtype, packed.kind)
    if packed.bits == 4:
        projection.weight = library.nn.Params4bit.from_prequantized(
            packed.data, dict(packed.statistics), device=device, module=projection
        )
    else:
        scales = packed.statistics["SCB"].to(device)
        data = packed.data.to(device)
        projection.weight = library.nn.Int8Params(data, requires_grad=False, CB=data, SCB=scales)
    projection.bias = module.bias
    return projection


def decoded(packed: PackedWeight) -> Tensor:
    """Returns the values (out, in) of a weight that a checkpoint keeps quantised, in float32."""
    rows, columns = packed.shape
    with torch.device("meta"):
        outline = nn.Linear(columns, rows, bias=False)
    return dequantize(restore(outline, packed, torch.float32))


def mark_restored(
    model: Model,
    transposed: Collection[str],
    bits: int,
    dtype: torch.dtype,
) -> Model:
    """Makes the projections of a model that transformers has loaded quantised compute as the parts' do.

    Args:
        model: The model. The call changes it.
        transposed: Names of the projections whose originals store the weight as (in, out).
        bits: 4 or 8.
        dtype: Type of computation. transformers leaves weights that are not quantised in the type of the files.
    """
    library = _library()
    quantised = (library.nn.Linear4bit, library.nn.Linear8bitLt)
    for name, module in model.named_modules():
        is_quantised = isinstance(module, quantised)
        if is_quantised:
            _settle(module)
            setattr(module, _MARK, name in transposed)
        for leaf, parameter in module.named_parameters(recurse=False):
            if not is_quantised or leaf != "weight":
                parameter.data = parameter.data.to(dtype)
    return mark_quantized(model, [bits])


def dequantize(module: nn.Module) -> Tensor:
    """Returns the decoded weight (out, in) of a quantised projection, in float32."""
    functional = _library().functional
    weight = cast(Any, module.weight)
    if hasattr(weight, "quant_state"):
        return functional.dequantize_4bit(weight.data, weight.quant_state).float()
    scale = weight.SCB if weight.SCB is not None else cast(Any, module.state).SCB  # moved by the first forward
    return functional.int8_vectorwise_dequant(weight.data, scale).float()


def is_quantized(module: nn.Module) -> bool:
    """Returns True for a result of `quantize`."""
    return hasattr(module, _MARK)


def was_transposed(module: nn.Module) -> bool:
    """Returns True for a quantised projection if the original stores the weight as (in, out)."""
    return bool(getattr(module, _MARK, False))


def values_in(parameter: Tensor) -> int:
    """Returns the number of weights in a parameter. A byte of a 4-bit parameter holds two weights.

    Example:
        >>> values_in(torch.zeros(2, 3))
        6
    """
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def mark_quantized(model: Model, bits: Iterable[int]) -> Model:
    """Sets the attributes by which PEFT recognises a model with weights in 4 or 8 bits, and returns the model."""
    for number in bits:
        setattr(model, f"is_loaded_in_{number}bit", True)
    return model
