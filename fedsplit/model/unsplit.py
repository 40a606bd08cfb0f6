"""The unsplit model, for whoever may hold it."""

from __future__ import annotations

from collections.abc import Mapping
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

from fedsplit.model.devices import CPU
from fedsplit.model.families import family_of
from fedsplit.model.parts import ranges
from fedsplit.model.quantization import dequantize, mark_quantized, quantize


def empty_model(path: Path, classes: int = 0) -> Any:
    """Returns the unsplit model without its weights, on the meta device.

    Args:
        path: A folder with config.json.
        classes: Number of classes of a classifier of sequences; 0 for a model of tokens.

    Raises:
        ValueError: The model's embedding has no row for its padding.
    """
    config = AutoConfig.from_pretrained(path)
    if classes:
        config.num_labels = classes
    made_by = AutoModelForSequenceClassification if classes else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            return made_by.from_config(config)
    except AssertionError:  # torch's; not every family gives its embedding a row for padding
        if config.pad_token_id is None or config.pad_token_id < config.vocab_size:
            raise
        words = f"pad_token_id is {config.pad_token_id}, its embedding has {config.vocab_size} rows"
        raise ValueError(words) from None


def transposed_layers(whole: Any) -> frozenset[str]:
    """The names of the layers that store their weights as (in, out), as GPT-2's do."""
    return frozenset(name for name, module in whole.named_modules() if isinstance(module, Conv1D))


def load_unsplit(path: Path, dtype: torch.dtype = torch.float32, classes: int = 0, pad: int | None = None) -> Any:
    """The unsplit model, for whoever may hold it: the reference in tests, the user after a run.

    Args:
        path: A folder with config.json and safetensors.
        dtype: The type of the weights.
        classes: Where above 0, a classifier of sequences whose head has random values.
        pad: Of a classifier, the token that fills up shorter sequences.
    """
    if classes:
        # A classifier's checkpoint may have a head of other classes, which is not read either.
        how = {"num_labels": classes, "pad_token_id": pad, "ignore_mismatched_sizes": True}
        return AutoModelForSequenceClassification.from_pretrained(path, dtype=dtype, **how)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


@torch.no_grad()
def quantize_unsplit(
    whole: Any, bounds: tuple[int, int], bits: Mapping[str, int], device: torch.device = CPU, dense: bool = False
) -> Any:
    """Gives the unsplit model the base weights that the parts of a run had.

    Args:
        whole: The library's causal LM, in the run's type; changed in place.
        bounds: The cut as (LO, HI).
        bits: By part, as for `load_parts`.
        device: Where it is.
        dense: Whether weights keep their type, and are only rounded to what the quantised ones stand for.
    """
    family = family_of(whole.config.model_type)
    blocks = whole.get_submodule(family.decoder).get_submodule(family.blocks)
    for kind, numbers in ranges(len(blocks), bounds).items():
        for number in numbers if kind in bits else ():
            for name, module in list(blocks[number].named_modules()):
                if type(module) not in (nn.Linear, Conv1D):
                    continue
                made = quantize(module.requires_grad_(False), bits[kind], whole.dtype, device)
                if dense:
                    rounded = dequantize(made)
                    module.weight.copy_(rounded if isinstance(module, nn.Linear) else rounded.t())
                else:
                    blocks[number].set_submodule(name, made)
    return whole if dense else mark_quantized(whole, bits.values())
