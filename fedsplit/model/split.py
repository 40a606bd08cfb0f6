"""Loads the parts of a party from the checkpoint of a model. Weights of further parts are not read."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from fedsplit.model import device_map
from fedsplit.model.attention import use_float32_attention, use_tanh_gelu
from fedsplit.model.block_layers import is_uncalled
from fedsplit.model.checkpoint_reader import CheckpointReader
from fedsplit.model.derivation import family_of
from fedsplit.model.devices import CPU
from fedsplit.model.facts import read_config
from fedsplit.model.parts import PARTS, SCORE, Kind, Part, ranges
from fedsplit.model.process_group import Shard
from fedsplit.model.quantization import mark_quantized, quantize, restore
from fedsplit.model.tensor_parallel import cut_dimension, styles_of
from fedsplit.model.unsplit import empty_model


def _restore_buffers(part: Part, checkpoint: CheckpointReader, places: Callable[[str], torch.device]) -> None:
    """Gives a part's buffers their values.

    A checkpoint has the buffers that the library calls persistent. The library computes the others when it initialises
    a module, such as rotary frequencies, or Gemma's factor of the embedding.

    Args:
        part: The part. Its weights are still on the meta device.
        checkpoint: Reader of the checkpoint.
        places: Device of a module by its name in the part.

    Raises:
        ValueError: The library has no rule for the values of a buffer.
    """
    empty: list[tuple[nn.Module, str]] = []
    for module_name, module in list(part.named_modules()):
        for name, old in list(module.named_buffers(recurse=False)):
            device = places(module_name)
            if name in module._non_persistent_buffers_set:
                values = torch.empty_like(old, device=device)
                if old.is_floating_point():
                    # NaN marks values that the library does not set below, so that a missing rule is noticed at once.
                    values.fill_(math.nan)
                setattr(module, name, nn.Buffer(values, persistent=False))
                empty.append((module, name))
            else:
                stored = checkpoint.parameter(part.unsplit_name(f"{module_name}.{name}"), device)
                setattr(module, name, nn.Buffer(stored.detach().to(old.dtype)))

    # A module's buffers may be computed with the module, or with the whole decoder.
    library: PreTrainedModel = part.decoder
    owners = {id(module): module for module, _ in empty}
    for module in (*owners.values(), library):
        library._init_weights(module)
    for module, name in empty:
        if bool(getattr(module, name).isnan().any()):
            raise ValueError(f"transformers has no rule for the values of {type(module).__name__}.{name}")


def load_parts(
    path: Path,
    bounds: tuple[int, int],
    kinds: Sequence[Kind],
    dtype: torch.dtype = torch.float32,
    kernels: str = "library",
    classes: int = 0,
    device: torch.device = CPU,
    bits: Mapping[str, int] | None = None,
    devices: Sequence[torch.device] = (),
    shard: Shard | None = None,
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
            Weights that the checkpoint keeps in 4 or 8 bits are restored as they are.
        devices: Several devices for the blocks of a single part, in place of `device`. Every block is read onto its
            device (`fedsplit.model.device_map`); inputs and outputs are on the first.
        shard: Place of this process among several that share a single part. Only its pieces of the projections are
            read (`fedsplit.model.tensor_parallel`).

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
    config = read_config(path)
    low, high = bounds
    if not 0 <= low < high <= config.num_hidden_layers:
        raise ValueError(f"cut {bounds} lies outside a model of {config.num_hidden_layers} blocks")

    # One reader for all parts: a tensor that two parts share, such as a tied head, is in memory once.
    if devices:
        device = devices[0]
    checkpoint = CheckpointReader(path, empty_model(path, classes), dtype, device)
    parts = []
    for kind in kinds:
        classes_of_part = classes if kind == "top" else 0
        part = empty_part(path, bounds, kind, dtype, kernels == "fused", classes_of_part)
        part_bits = (bits or {}).get(kind, 0)
        by_block = device_map.plan(part, devices) if devices else [device] * len(part.blocks)
        filled = _fill_pieces(part, checkpoint, device, shard) if shard is not None else ()
        parts.append(_loaded(part, checkpoint, dtype, device, part_bits, by_block, filled))
    return parts


def _loaded(
    part: Part,
    checkpoint: CheckpointReader,
    dtype: torch.dtype,
    device: torch.device,
    bits: int,
    by_block: Sequence[torch.device],
    filled: Collection[str],
) -> Part:
    """Gives an empty part weights and buffers.

    Args:
        part: The part, without weights.
        checkpoint: Reader of the checkpoint.
        dtype: Type of the base weights and of computation.
        device: Device of the part.
        bits: Bits of the base weights in the part's blocks; 0 for `dtype`.
        by_block: Device of each block.
        filled: Names of the modules that have their weights already.
    """
    # Before the weights are read: the library may initialise a whole module, weights and buffers.
    _restore_buffers(part, checkpoint, functools.partial(_place_of, part, device, by_block))
    _fill(part, checkpoint, dtype, device, bits, by_block, filled)
    if len({*by_block}) > 1:
        device_map.dispatch(part, by_block)
    bits = checkpoint.bits or bits
    return mark_quantized(part.eval(), [bits] if bits else [])


def empty_part(
    path: Path,
    bounds: tuple[int, int],
    kind: Kind,
    dtype: torch.dtype,
    fused: bool,
    classes: int,
) -> Part:
    """Returns a part without weights, on the meta device. For the arguments see `load_parts`."""
    config = read_config(path)
    if fused:
        use_tanh_gelu(config)
    family = family_of(config)
    if classes:
        config.num_labels = classes
    model_class = AutoModelForSequenceClassification if classes else AutoModelForCausalLM
    with torch.device("meta"):
        model = model_class.from_config(config, dtype=dtype)
    if fused:
        use_float32_attention(model.config, dtype)
    blocks = ranges(config.num_hidden_layers, bounds)[kind]
    return PARTS[kind](kind, family, blocks, model, fused, dtype)


def _fill(
    part: Part,
    checkpoint: CheckpointReader,
    dtype: torch.dtype,
    device: torch.device,
    bits: int,
    by_block: Sequence[torch.device],
    filled: Collection[str],
) -> None:
    """Reads the weights of a part. A new head for classes gets uninitialised memory.

    For the arguments see `_loaded`.
    """
    # A list, since the loop replaces modules of the part.
    for module_name, module in list(part.named_modules()):
        if module_name in filled:
            continue
        place = _place_of(part, device, by_block, module_name)
        is_projection = _is_projection(part, module_name, module)
        packed = checkpoint.packed(part.unsplit_name(f"{module_name}.weight")) if is_projection else None
        for name, old in list(module.named_parameters(recurse=False)):
            if packed is not None and name == "weight":
                continue
            if module_name == SCORE:
                new = nn.Parameter(torch.empty(old.shape, device=device))
            else:
                new = checkpoint.parameter(part.unsplit_name(f"{module_name}.{name}"), place)
            setattr(module, name, new)
        if packed is not None:
            part.set_submodule(module_name, restore(module, packed, dtype, place))
        elif bits and is_projection and not checkpoint.bits:
            part.set_submodule(module_name, quantize(module, bits, dtype, place))
            # The weight that has been quantised is freed at once, so that a part never is in memory in both forms.
            checkpoint.forget(module.parameters())
            module.weight = None


def _place_of(
    part: Part,
    device: torch.device,
    by_block: Sequence[torch.device],
    module_name: str,
) -> torch.device:
    """Returns the device of a module: its block's, or the part's if the module is in no block.

    Args:
        part: The part.
        device: Device of the part.
        by_block: Device of each block.
        module_name: Name of the module in the part.
    """
    prefix = f"{part.family.decoder}.{part.family.blocks}."
    if not module_name.startswith(prefix):
        return device
    return by_block[int(module_name.removeprefix(prefix).partition(".")[0])]


def _fill_pieces(
    part: Part,
    checkpoint: CheckpointReader,
    device: torch.device,
    shard: Shard,
) -> list[str]:
    """Reads this process's pieces of the projections that several processes share, and returns their names.

    Args:
        part: The part, without weights.
        checkpoint: Reader of the checkpoint.
        device: Device of the part.
        shard: Place of this process.
    """
    styles = styles_of(part, shard.size)
    for module_name, style in styles.items():
        module = part.get_submodule(module_name)
        assert isinstance(module, nn.Linear)
        stored = part.unsplit_name(module_name)
        dimension = cut_dimension(style)
        place = shard.of(module.weight.shape[dimension])
        module.weight = checkpoint.piece(f"{stored}.weight", dimension, place, device)
        if module.bias is not None and dimension == 0:
            module.bias = checkpoint.piece(f"{stored}.bias", 0, place, device)
        elif module.bias is not None:  # outputs are added, and the bias counts once
            module.bias = checkpoint.parameter(f"{stored}.bias", device) if shard.rank == 0 else None  # type: ignore
        # PEFT gives the factors of an adapter the sizes in these attributes.
        module.out_features, module.in_features = module.weight.shape
    return list(styles)


def _is_projection(part: Part, name: str, module: nn.Module) -> bool:
    """Returns True for a projection inside a block that computes by itself, and so can be quantised."""
    blocks = f"{part.family.decoder}.{part.family.blocks}."
    computes = not is_uncalled(name, part.family)
    return computes and name.startswith(blocks) and type(module) in (nn.Linear, Conv1D)
