"""Weights that a checkpoint keeps in 4 or 8 bits, as bitsandbytes has quantised them.

Beside a weight, the files have the statistics that decode it. So a party restores its own projections from its own
tensors. Files come from strangers, and the library's kernels read as many statistics as a weight needs: all sizes are
checked before.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

METHOD = "bitsandbytes"
"""Name of this kind of weights in config.json."""

STATE = "quant_state.bitsandbytes__"
"""Begin of the name of the packed settings of a 4-bit weight. The end is the kind, `nf4` or `fp4`."""

_OF_FOUR = re.compile(rf"(.+\.weight)\.(absmax|quant_map|nested_absmax|nested_quant_map|{re.escape(STATE)}\w+)")
_OF_EIGHT = re.compile(r"(.+)\.(SCB|weight_format)")
"""Match the names of statistics. The first group leads to the weight, the second is the library's name."""

_KINDS = ("nf4", "fp4")
_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_TYPES = ("float32", "float16", "bfloat16")
_CODES, _NESTED_CODES = 16, 256


def quantization_of(folder: Path) -> dict[str, Any]:
    """Returns the `quantization_config` in a model's config.json; empty if there is none.

    Example:
        >>> from fedsplit.settings.config import BUNDLED_MODEL
        >>> quantization_of(BUNDLED_MODEL)
        {}
    """
    try:
        document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    settings = document.get("quantization_config") if isinstance(document, dict) else None
    return settings if isinstance(settings, dict) else {}


def bits_in(settings: Mapping[str, Any]) -> int:
    """Returns the bits of a checkpoint's weights; 0 for weights that bitsandbytes has not quantised.

    Args:
        settings: The `quantization_config` of config.json.

    Example:
        >>> bits_in({"quant_method": "bitsandbytes", "load_in_4bit": True})
        4
        >>> bits_in({"quant_method": "gptq", "bits": 4})
        0
    """
    if settings.get("quant_method", METHOD) != METHOD:  # the first versions of transformers wrote none
        return 0
    if settings.get("load_in_4bit") is True:
        return 4
    keeps_floats = settings.get("llm_int8_has_fp16_weight") is True
    return 8 if settings.get("load_in_8bit") is True and not keeps_floats else 0


def settings_for(settings: Mapping[str, Any], dtype: torch.dtype, dense: Sequence[str]) -> dict[str, Any]:
    """Returns the library's settings of quantisation, so that the unsplit model computes as parts do.

    Args:
        settings: The `quantization_config` of config.json.
        dtype: Type of computation. The type in config.json would hold for 4-bit weights alone.
        dense: Names of the projections that the files do not have quantised. config.json may have other names.

    Example:
        >>> settings_for({"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}, torch.float32, ["lm_head"])
        {'load_in_4bit': True, 'bnb_4bit_compute_dtype': 'float32', 'llm_int8_skip_modules': ['lm_head']}
    """
    compute_type = str(dtype).removeprefix("torch.")
    return {**settings, "bnb_4bit_compute_dtype": compute_type, "llm_int8_skip_modules": [*dense]}


def statistics_of(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Finds the statistics among the tensors of a checkpoint.

    Args:
        names: Names of all tensors in the files.

    Returns:
        Names in the files by the library's names, by the name of the weight.

    Example:
        >>> statistics_of(["up.weight", "up.weight.absmax", "down.weight", "down.SCB", "norm.weight"])
        {'up.weight': {'absmax': 'up.weight.absmax'}, 'down.weight': {'SCB': 'down.SCB'}}
    """
    found: dict[str, dict[str, str]] = {}
    for name in names:
        of_four, of_eight = _OF_FOUR.fullmatch(name), _OF_EIGHT.fullmatch(name)
        if of_four:
            found.setdefault(of_four[1], {})[of_four[2]] = name
        elif of_eight:
            found.setdefault(f"{of_eight[1]}.weight", {})[of_eight[2]] = name
    return found


def without_statistics(names: Iterable[str], statistics: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Returns the names of tensors that are no statistics of a weight."""
    aside: Collection[str] = {name for group in statistics.values() for name in group.values()}
    return [name for name in names if name not in aside]


@dataclass(frozen=True)
class PackedWeight:
    """A quantised weight of a checkpoint, with valid sizes.

    Attributes:
        bits: 4 or 8.
        data: The weight as it is stored.
        statistics: What decodes the weight, by the library's names.
        shape: Shape (out, in) of the decoded weight.
        kind: Kind of the codes of a 4-bit weight, `nf4` or `fp4`.
    """

    bits: int
    data: Tensor
    statistics: Mapping[str, Tensor]
    shape: tuple[int, ...]
    kind: str = ""


def packed_weight(data: Tensor, statistics: Mapping[str, Tensor]) -> PackedWeight:
    """Checks a quantised weight.

    Args:
        data: The weight as it is stored.
        statistics: What decodes the weight, by the library's names.

    Raises:
        ValueError: Statistics are missing, do not fit the weight, or are not finite.
    """
    for key, values in statistics.items():
        if values.is_floating_point() and not bool(values.isfinite().all()):
            raise ValueError(f"its {key} holds values that are not finite")
    if "SCB" in statistics:
        return _packed_in_eight(data, statistics)
    return _packed_in_four(data, statistics)


def _packed_in_eight(data: Tensor, statistics: Mapping[str, Tensor]) -> PackedWeight:
    """Checks an 8-bit weight; see `packed_weight`."""
    is_matrix = data.dtype == torch.int8 and data.ndim == 2
    scales = statistics["SCB"]
    if not is_matrix or scales.shape != (len(data),) or not scales.is_floating_point():
        raise ValueError("its weight in 8 bits and its SCB do not belong together")
    form = statistics.get("weight_format")
    if form is not None and form.flatten().tolist() != [0]:
        raise ValueError("its weight_format is not 0, by rows, the only one that bitsandbytes still has")
    return PackedWeight(8, data, {"SCB": scales.float()}, tuple(data.shape))


def _packed_in_four(data: Tensor, statistics: Mapping[str, Tensor]) -> PackedWeight:
    """Checks a 4-bit weight; see `packed_weight`."""
    names = [name for name in statistics if name.startswith(STATE)]
    if len(names) != 1 or not {"absmax", "quant_map"} <= statistics.keys():
        raise ValueError("it lacks statistics of a weight in 4 bits")
    state = _state(statistics[names[0]])
    kind = names[0].removeprefix(STATE)
    shape = tuple(state["shape"])
    blocks = math.ceil(math.prod(shape) / state["blocksize"])
    sizes = {"quant_map": _CODES, "absmax": blocks}
    is_nested = "nested_absmax" in statistics
    if is_nested:
        nested = state.get("nested_blocksize")
        offset = state.get("nested_offset")
        is_possible = nested in _BLOCK_SIZES and isinstance(offset, float) and math.isfinite(offset)
        if not is_possible or state.get("nested_dtype") not in _TYPES:
            raise ValueError("its packed settings cannot be read")
        sizes |= {"nested_quant_map": _NESTED_CODES, "nested_absmax": math.ceil(blocks / nested)}
    for key, size in sizes.items():
        if key not in statistics or statistics[key].shape != (size,):
            raise ValueError(f"its {key} does not belong to a weight of the shape {list(shape)}")
    # Scales that are quantised, too, are codes of 8 bits.
    is_packed = statistics["absmax"].dtype == (torch.uint8 if is_nested else torch.float32)
    has_all_bytes = data.nbytes == math.ceil(math.prod(shape) / 2)
    if not is_packed or not has_all_bytes or state["quant_type"] != kind:
        raise ValueError(f"its bytes are no weight of the shape {list(shape)} in 4 bits")
    return PackedWeight(4, data, statistics, shape, kind)


def _state(packed: Tensor) -> dict[str, Any]:
    """Reads the packed settings of a 4-bit weight: JSON, byte by byte.

    Raises:
        ValueError: The settings are impossible.
    """
    try:
        state = json.loads(bytes(packed.tolist()))
        shape = state["shape"]
        is_shape = len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)
        is_possible = is_shape and state["blocksize"] in _BLOCK_SIZES and state["dtype"] in _TYPES
        if is_possible and state["quant_type"] in _KINDS:
            return dict(state)
    except (ValueError, KeyError, TypeError):
        pass  # the error below says so
    raise ValueError("its packed settings cannot be read")
