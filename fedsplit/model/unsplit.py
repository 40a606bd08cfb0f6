"""Loads the unsplit model: the reference in tests, and the model that a user works with after a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from fedsplit.model.block_layers import is_uncalled
from fedsplit.model.derivation import family_of, whole_config
from fedsplit.model.devices import CPU
from fedsplit.model.facts import read_config
from fedsplit.model.families import Family
from fedsplit.model.fp8_weights import without_float8
from fedsplit.model.head import HEAD
from fedsplit.model.parts import ranges
from fedsplit.model.quantization import dequantize, mark_quantized, mark_restored, quantize
from fedsplit.model.stored_bits import bits_in, quantization_of, settings_for, statistics_of, without_statistics
from fedsplit.model.stored_names import sources_of
from fedsplit.model.weight_files import find_tensors


def empty_model(path: Path, classes: int = 0) -> PreTrainedModel:
    """Returns the unsplit model without weights, on the meta device.

    Args:
        path: Folder with config.json.
        classes: Number of classes of a sequence classifier; 0 for a language model.

    Raises:
        ValueError: The embedding has no row for the padding token.

    Example:
        >>> from fedsplit.settings.config import BUNDLED_MODEL
        >>> next(empty_model(BUNDLED_MODEL).parameters()).is_meta
        True
    """
    config = read_config(path)
    if classes:
        config.num_labels = classes
    model_class = AutoModelForSequenceClassification if classes else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            return model_class.from_config(config)
    except AssertionError:  # from torch, for a family that passes the padding token to its embedding
        if config.pad_token_id is None or config.pad_token_id < config.vocab_size:
            raise
        reason = f"pad_token_id is {config.pad_token_id}, its embedding has {config.vocab_size} rows"
        raise ValueError(reason) from None


def transposed_layers(model: nn.Module) -> frozenset[str]:
    """Returns the names of layers with weights stored as (in, out), such as GPT-2's projections."""
    return frozenset(name for name, module in model.named_modules() if isinstance(module, Conv1D))


def load_unsplit(
    path: Path,
    dtype: torch.dtype = torch.float32,
    classes: int = 0,
    pad: int | None = None,
) -> PreTrainedModel:
    """Loads the unsplit model. Of a model of images and text, this is the text model alone.

    Args:
        path: Folder with config.json and safetensors files.
        dtype: Type of the weights.
        classes: Number of classes. If above 0, the result is a sequence classifier with a random head.
        pad: Padding token of a classifier.

    Example:
        >>> from fedsplit.settings.config import BUNDLED_MODEL
        >>> load_unsplit(BUNDLED_MODEL).num_parameters()
        1353728
    """
    config = read_config(path)
    is_nested = whole_config(path).model_type != config.model_type
    quantised = quantization_of(path)
    bits = bits_in(quantised)
    transposed: frozenset[str] = frozenset()
    if bits:
        outline = empty_model(path, classes)
        transposed = transposed_layers(outline)
        config.quantization_config = settings_for(quantised, dtype, _dense_projections(path, outline))
    elif quantised:
        config.quantization_config = without_float8(quantised)
    options: dict[str, Any] = {"config": config, "dtype": dtype, "trust_remote_code": False}
    if is_nested:
        options["key_mapping"] = _text_names(config)
    if classes:
        config.num_labels, config.pad_token_id = classes, pad
        # The checkpoint of a classifier may have a head for a different number of classes. The head is not read.
        model = AutoModelForSequenceClassification.from_pretrained(path, ignore_mismatched_sizes=True, **options)
    else:
        model = AutoModelForCausalLM.from_pretrained(path, **options)
    if is_nested:
        model._weight_conversions = None  # or `save_pretrained` would write the names of the model of images
    return mark_restored(model, transposed, bits, dtype) if bits else model


def _dense_projections(path: Path, model: PreTrainedModel) -> list[str]:
    """Returns the names of the projections that a quantised checkpoint has in floating point, or does not have.

    Args:
        path: Folder of the checkpoint.
        model: The model without weights.
    """
    files = find_tensors(path)
    statistics = statistics_of(files)
    dense = []
    sources = sources_of(model, without_statistics(files, statistics))
    for name, module in model.named_modules():
        source = sources.get(f"{name}.weight")
        is_quantised = source is not None and source.names[0] in statistics
        if type(module) in (nn.Linear, Conv1D) and not is_quantised:
            dense.append(name)
    return dense


def unsplit_with(
    weights: Mapping[str, Tensor],
    path: Path,
    dtype: torch.dtype,
    classes: int = 0,
    pad: int | None = None,
) -> PreTrainedModel:
    """Returns the unsplit model with given weights.

    Args:
        weights: Weights by name in the library's model. What is tied to another weight, and the head of a classifier,
            may be missing.
        path: Folder with config.json.
        dtype: Type of the weights.
        classes: As for `load_unsplit`.
        pad: As for `load_unsplit`.
    """
    config = read_config(path)
    if hasattr(config, "quantization_config"):
        # The given weights are decoded, and with this key the library would expect quantised ones.
        del config.quantization_config
    if classes:
        config.num_labels, config.pad_token_id = classes, pad
    model_class = type(empty_model(path, classes))
    return model_class.from_pretrained(None, config=config, state_dict=dict(weights), dtype=dtype)


def _text_names(config: PretrainedConfig) -> dict[str, str]:
    """Returns the library's renaming of a checkpoint that has the text model nested in a model of images and text.

    Args:
        config: Configuration of the text model.
    """
    decoder = family_of(config).decoder
    nested = r"^(?:model\.)?language_model\."
    return {
        rf"{nested}(?={decoder}\.|{HEAD}\.)": "",
        rf"{nested}(?!{decoder}\.|{HEAD}\.)": f"{decoder}.",
    }


@torch.no_grad()
def quantize_unsplit(
    model: PreTrainedModel,
    bounds: tuple[int, int],
    bits: Mapping[str, int],
    device: torch.device = CPU,
    dense: bool = False,
) -> PreTrainedModel:
    """Quantises the base weights of the unsplit model, in the same way as the parts of a run.

    Args:
        model: A causal language model in the run's type. The call changes the model.
        bounds: The cut as (LO, HI).
        bits: Bits by part, as for `fedsplit.model.split.load_parts`.
        device: Device of the model.
        dense: True for weights of the original type, rounded to the values of the quantised weights.

    Returns:
        The same model.
    """
    family = family_of(model.config)
    blocks = model.get_submodule(family.decoder).get_submodule(family.blocks)
    for kind, numbers in ranges(len(blocks), bounds).items():
        if kind not in bits:
            continue
        for number in numbers:
            _quantize_block(blocks[number], family, bits[kind], model.dtype, device, dense)
    return model if dense else mark_quantized(model, bits.values())


def _quantize_block(
    block: nn.Module,
    family: Family,
    bits: int,
    dtype: torch.dtype,
    device: torch.device,
    dense: bool,
) -> None:
    """Quantises the projections of a block, in place. For the further arguments see `quantize_unsplit`.

    Args:
        block: The block.
        family: Record of the model's type.
        bits: 4 or 8.
        dtype: Type of computation.
        device: Device of the model.
        dense: As for `quantize_unsplit`.
    """
    for name, module in list(block.named_modules()):
        if type(module) not in (nn.Linear, Conv1D) or is_uncalled(name, family):
            continue
        projection = quantize(module.requires_grad_(False), bits, dtype, device)
        if dense:
            rounded = dequantize(projection)  # (out, in), whatever the layer stores
            module.weight.copy_(rounded if isinstance(module, nn.Linear) else rounded.t())
        else:
            block.set_submodule(name, projection)
