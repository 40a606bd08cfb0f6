"""A causal LM cut in three: loads the parts that a party owns, and nothing else of the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from transformers.pytorch_utils import Conv1D

from fedsplit.model.attention import use_float32_attention, use_tanh_gelu
from fedsplit.model.checkpoint_reader import CheckpointReader
from fedsplit.model.devices import CPU
from fedsplit.model.families import family_of
from fedsplit.model.parts import PARTS, SCORE, Kind, Part, ranges
from fedsplit.model.quantization import mark_quantized, quantize
from fedsplit.model.unsplit import empty_model


def _restore_scale(decoder: Any, embedding: nn.Module, device: torch.device) -> None:
    """Gives an embedding that scales what it looks up its factor, which no checkpoint has; the library knows it."""
    for name, buffer in list(embedding.named_buffers()):
        setattr(embedding, name, nn.Buffer(torch.empty_like(buffer, device=device), persistent=False))
    decoder._init_weights(embedding)


def load_parts(
    path: Path,
    bounds: tuple[int, int],
    kinds: Sequence[Kind],
    dtype: torch.dtype = torch.float32,
    kernels: str = "library",
    classes: int = 0,
    device: torch.device = CPU,
    bits: Mapping[str, int] | None = None,
) -> list[Any]:
    """Loads some parts of a model; of the checkpoint, nothing else is read.

    All base weights are frozen. Parts loaded together share tensors that are tied.

    Args:
        path: A folder with config.json and safetensors.
        bounds: The cut as (LO, HI).
        kinds: The parts to load.
        dtype: The type of the weights, whatever type they are stored in, and of computation.
        kernels: "fused" computes with `fedsplit.model.kernels`, which is the same to rounding; "library" with the
            library's code alone, which is the unsplit model to the bit.
        classes: Where above 0, the top gets a new head, `score`, that tells so many classes of sequences. It has no
            values yet: `fedsplit.adaptation.lora.add` draws them.
        device: Where the parts are put.
        bits: By part, 4 or 8 bits in which its blocks keep their base weights; in `dtype` where it is left out.

    Returns:
        The parts, in the order of `kinds`, in evaluation mode.

    Raises:
        ValueError: The checkpoint lacks a tensor, or the cut lies outside the model.
    """
    config, fused = AutoConfig.from_pretrained(path), kernels == "fused"
    family = family_of(config.model_type)
    if not 0 <= bounds[0] < bounds[1] <= config.num_hidden_layers:
        raise ValueError(f"cut {bounds} lies outside a model of {config.num_hidden_layers} blocks")
    checkpoint = CheckpointReader(path, empty_model(path, classes), dtype, device)
    parts = []
    for kind in kinds:
        part = empty_part(path, bounds, kind, dtype, fused, classes if kind == "top" else 0)
        if kind == "bottom":
            _restore_scale(part.decoder, getattr(part.decoder, family.embedding), device)
        _fill(part, checkpoint, dtype, device, (bits or {}).get(kind, 0))
        if family.rotary:
            rotary = type(getattr(part.decoder, family.rotary))
            setattr(part.decoder, family.rotary, rotary(config=part.config).to(device))
        parts.append(mark_quantized(part.eval(), [bits[kind]] if bits and kind in bits else []))
    return parts


def empty_part(path: Path, bounds: tuple[int, int], kind: Kind, dtype: torch.dtype, fused: bool, classes: int) -> Part:
    """A part without values, on the meta device; see `load_parts` for the arguments."""
    config = AutoConfig.from_pretrained(path)
    if fused:
        use_tanh_gelu(config)
    if classes:
        config.num_labels = classes
    made_by = AutoModelForSequenceClassification if classes else AutoModelForCausalLM
    with torch.device("meta"):
        whole = made_by.from_config(config, dtype=dtype)
    if fused:
        use_float32_attention(whole.config, dtype)
    blocks = ranges(config.num_hidden_layers, bounds)[kind]
    return PARTS[kind](kind, family_of(config.model_type), blocks, whole, fused, dtype)


def _fill(part: Part, checkpoint: CheckpointReader, dtype: torch.dtype, device: torch.device, bits: int) -> None:
    """Gives a part its weights; a new head gets room for its own."""
    for module_name, module in list(part.named_modules()):
        for name, old in list(module.named_parameters(recurse=False)):
            if module_name == SCORE:
                setattr(module, name, nn.Parameter(torch.empty(old.shape, device=device)))
            else:
                setattr(module, name, checkpoint.parameter(part.unsplit_name(f"{module_name}.{name}")))
        if bits and _is_projection(part, module_name, module):
            part.set_submodule(module_name, quantize(module, bits, dtype, device))
            checkpoint.forget(module.parameters())
            module.weight = None


def _is_projection(part: Part, name: str, module: nn.Module) -> bool:
    """Whether a module is a projection inside a block."""
    blocks = f"{part.family.decoder}.{part.family.blocks}."
    return name.startswith(blocks) and type(module) in (nn.Linear, Conv1D)
