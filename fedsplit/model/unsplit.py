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
from fedsplit.model.quantization import announced, dequantized, quantized


def blank(path: Path, classes: int = 0) -> Any:
    """The unsplit model without its weights, on the meta device.

    Args:
        path: A folder with config.json.
        classes: Where above 0, a classifier of sequences.
    """
    config, made_by = AutoConfig.from_pretrained(path), AutoModelForCausalLM
    if classes:
        config.num_labels, made_by = classes, AutoModelForSequenceClassification
    with torch.device("meta"):
        return made_by.from_config(config)


def transposed_layers(whole: Any) -> frozenset[str]:
    """The names of the layers that store their weights as (in, out), as GPT-2's do."""
    return frozenset(name for name, module in whole.named_modules() if isinstance(module, Conv1D))


def load_whole(path: Path, dtype: torch.dtype = torch.float32, classes: int = 0, pad: int | None = None) -> Any:
    """The unsplit model, for whoever may hold it: the reference in tests, the user after a run.

    Args:
        path: A folder with config.json and safetensors.
        dtype: The type of the weights.
        classes: Where above 0, a classifier of sequences whose head has random values.
        pad: Of a classifier, the token that fills up shorter sequences.
    """
    if classes:
        made_by = AutoModelForSequenceClassification
        return made_by.from_pretrained(path, dtype=dtype, num_labels=classes, pad_token_id=pad)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


@torch.no_grad()
def quantize_whole(
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
                made = quantized(module.requires_grad_(False), bits[kind], whole.dtype, device)
                if dense:
                    rounded = dequantized(made)
                    module.weight.copy_(rounded if isinstance(module, nn.Linear) else rounded.t())
                else:
                    blocks[number].set_submodule(name, made)
    return whole if dense else announced(whole, bits.values())
