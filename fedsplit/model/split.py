"""Loads the parts of a party from the checkpoint of a model. Weights of further parts are not read."""

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
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from fedsplit.model.attention import use_float32_attention, use_tanh_gelu
from fedsplit.model.checkpoint_reader import CheckpointReader
from fedsplit.model.devices import CPU
from fedsplit.model.families import family_of
from fedsplit.model.parts import PARTS, SCORE, Kind, Part, ranges
from fedsplit.model.quantization import mark_quantized, quantize
from fedsplit.model.unsplit import empty_model


def _restore_scale(decoder: PreTrainedModel, embedding: nn.Module, device: torch.device) -> None:
    """Restores the scaling factor of an embedding, such as Gemma's.

    The factor is a buffer that checkpoints do not store. The library computes the factor when it initialises the
    module.
    """
    for name, buffer in list(embedding.named_buffers()):
        memory = torch.empty_like(buffer, device=device)
        setattr(embedding, name, nn.Buffer(memory, persistent=False))
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
    """Loads parts of a model. Only the parts' tensors are read from the checkpoint.

    All base weights are frozen. Parts that are loaded together share tied tensors.

    Args:
        path: Folder with config.json and safetensors files.
        bounds: The cut as (LO, HI): the trunk has the blocks from LO to HI - 1.
        kinds: The parts to load.
        dtype: Type of the base weights and of computation. Weights of a different type in the file are cast.
        kernels: "library" computes with the library's code alone, and is bit-equal to the unsplit model. "fused"
            computes with `fedsplit.model.kernels`, and is equal up to rounding.
        classes: Number of classes of sequences. If above 0, the top gets a new head `score` without values.
            `fedsplit.adaptation.lora.add` draws the values.
        device: Device of the parts.
        bits: Bits (4 or 8) for the base weights in a part's blocks, by part. A part without bits keeps `dtype`.

    Returns:
        The parts, in the order of `kinds`, in evaluation mode.

    Raises:
        ValueError: The checkpoint lacks a tensor, or the cut lies outside the model.

    Example:
        >>> from fedsplit.settings.config import BUNDLED_MODEL
        >>> bottom, trunk, top = load_parts(BUNDLED_MODEL, (1, 5), ["bottom", "trunk", "top"])
        >>> hidden = trunk(bottom(torch.tensor([[3, 4, 5]])))
        >>> hidden.shape
        torch.Size([1, 3, 128])
        >>> top.logits(hidden).shape
        torch.Size([1, 3, 1024])
    """
    config = AutoConfig.from_pretrained(path)
    low, high = bounds
    if not 0 <= low < high <= config.num_hidden_layers:
        raise ValueError(f"cut {bounds} lies outside a model of {config.num_hidden_layers} blocks")

    # One reader for all parts: a tensor that two parts share, such as a tied head, is in memory once.
    checkpoint = CheckpointReader(path, empty_model(path, classes), dtype, device)
    parts = []
    for kind in kinds:
        classes_of_part = classes if kind == "top" else 0
        part = empty_part(path, bounds, kind, dtype, kernels == "fused", classes_of_part)
        part_bits = (bits or {}).get(kind, 0)
        parts.append(_loaded(part, checkpoint, dtype, device, part_bits))
    return parts


def _loaded(part: Part, checkpoint: CheckpointReader, dtype: torch.dtype, device: torch.device, bits: int) -> Part:
    """Gives an empty part weights and buffers.

    Args:
        part: The part, without weights.
        checkpoint: Reader of the checkpoint.
        dtype: Type of the base weights and of computation.
        device: Device of the part.
        bits: Bits of the base weights in the part's blocks; 0 for `dtype`.
    """
    family = part.family
    # Before the weights are read: the library initialises the whole module, weight and factor.
    if part.kind == "bottom":
        _restore_scale(part.decoder, getattr(part.decoder, family.embedding), device)
    _fill(part, checkpoint, dtype, device, bits)
    # The rotary frequencies are buffers, too. No checkpoint has the frequencies, so the library computes them.
    if family.rotary:
        rotary = type(getattr(part.decoder, family.rotary))
        setattr(part.decoder, family.rotary, rotary(config=part.config).to(device))
    return mark_quantized(part.eval(), [bits] if bits else [])


def empty_part(path: Path, bounds: tuple[int, int], kind: Kind, dtype: torch.dtype, fused: bool, classes: int) -> Part:
    """Returns a part without weights, on the meta device. For the arguments see `load_parts`."""
    config = AutoConfig.from_pretrained(path)
    if fused:
        use_tanh_gelu(config)
    if classes:
        config.num_labels = classes
    model_class = AutoModelForSequenceClassification if classes else AutoModelForCausalLM
    with torch.device("meta"):
        model = model_class.from_config(config, dtype=dtype)
    if fused:
        use_float32_attention(model.config, dtype)
    blocks = ranges(config.num_hidden_layers, bounds)[kind]
    return PARTS[kind](kind, family_of(config.model_type), blocks, model, fused, dtype)


def _fill(part: Part, checkpoint: CheckpointReader, dtype: torch.dtype, device: torch.device, bits: int) -> None:
    """Reads the weights of a part. A new head for classes gets uninitialised memory."""
    for module_name, module in list(part.named_modules()):
        for name, old in list(module.named_parameters(recurse=False)):
            if module_name == SCORE:
                new = nn.Parameter(torch.empty(old.shape, device=device))
            else:
                new = checkpoint.parameter(part.unsplit_name(f"{module_name}.{name}"))
            setattr(module, name, new)
        if bits and _is_projection(part, module_name, module):
            part.set_submodule(module_name, quantize(module, bits, dtype, device))
            checkpoint.forget(module.parameters())
            module.weight = None


def _is_projection(part: Part, name: str, module: nn.Module) -> bool:
    """Returns True for a projection inside a block."""
    blocks = f"{part.family.decoder}.{part.family.blocks}."
    return name.startswith(blocks) and type(module) in (nn.Linear, Conv1D)
