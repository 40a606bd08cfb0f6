"""Loads the unsplit model: the reference in tests, and the model that a user works with after a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from fedsplit.model.devices import CPU
from fedsplit.model.families import family_of
from fedsplit.model.parts import ranges
from fedsplit.model.quantization import dequantize, mark_quantized, quantize


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
    config = AutoConfig.from_pretrained(path)
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
    path: Path, dtype: torch.dtype = torch.float32, classes: int = 0, pad: int | None = None
) -> PreTrainedModel:
    """Loads the unsplit model.

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
    if classes:
        # The checkpoint of a classifier may have a head for a different number of classes. The head is not read.
        options = {"num_labels": classes, "pad_token_id": pad, "ignore_mismatched_sizes": True}
        return AutoModelForSequenceClassification.from_pretrained(path, dtype=dtype, **options)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


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
    family = family_of(model.config.model_type)
    blocks = model.get_submodule(family.decoder).get_submodule(family.blocks)
    for kind, numbers in ranges(len(blocks), bounds).items():
        if kind not in bits:
            continue
        for number in numbers:
            _quantize_block(blocks[number], bits[kind], model.dtype, device, dense)
    return model if dense else mark_quantized(model, bits.values())


def _quantize_block(block: nn.Module, bits: int, dtype: torch.dtype, device: torch.device, dense: bool) -> None:
    """Quantises the projections of a block, in place. For the arguments see `quantize_unsplit`."""
    for name, module in list(block.named_modules()):
        if type(module) not in (nn.Linear, Conv1D):
            continue
        projection = quantize(module.requires_grad_(False), bits, dtype, device)
        if dense:
            rounded = dequantize(projection)  # (out, in), whatever the layer stores
            module.weight.copy_(rounded if isinstance(module, nn.Linear) else rounded.t())
        else:
            block.set_submodule(name, projection)
