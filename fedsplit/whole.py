"""The unsplit model after a run, for whoever may hold it: opened with an adapter, and measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from fedsplit import lora
from fedsplit.config import Config, InputError, SettingError
from fedsplit.devices import CPU, device_of
from fedsplit.families import read_facts
from fedsplit.finished import Adapter
from fedsplit.quantization import check_quantization, is_quantized, was_transposed
from fedsplit.split import TYPES, check_checkpoint, load_whole, quantize_whole
from fedsplit.updates import Adapters


@dataclass(frozen=True)
class Score:
    """How well a model predicts a text.

    Attributes:
        nats: Sum of the losses of all predicted tokens.
        right: How many were the likeliest in the model's eyes.
        tokens: How many were predicted.
    """

    nats: float = 0.0
    right: int = 0
    tokens: int = 0

    @property
    def loss(self) -> float:
        """Mean loss in nats a token; its exponential is the perplexity."""
        return self.nats / self.tokens

    @property
    def accuracy(self) -> float:
        """The share of tokens that were predicted rightly."""
        return self.right / self.tokens

    def __add__(self, other: Score) -> Score:
        return Score(self.nats + other.nats, self.right + other.right, self.tokens + other.tokens)


def open_base(model_path: Path, dtype: str, device: torch.device = CPU) -> Any:
    """The base model as a run held it.

    Args:
        model_path: Its folder.
        dtype: One of `fedsplit.config.DTYPES`.
        device: Where to.

    Raises:
        SettingError: The folder holds no model, or a broken one.
    """
    read_facts(model_path)
    check_checkpoint(model_path)
    return load_whole(model_path, TYPES[dtype]).eval().to(device)


def open_held(adapter: Adapter, device: torch.device = CPU, dense: bool = False) -> Any:
    """The base model as the run of an adapter held it; quantised where it was.

    Args:
        adapter: The adapter.
        device: Where to.
        dense: Whether quantised weights are decoded to the run's type, so that something can be added to them.

    Raises:
        SettingError: As in `open_base`; or the model has fewer blocks, or cannot be quantised here.
    """
    held = Config(cut=adapter.cut, quantization=adapter.quantization, dtype=adapter.dtype, device=str(device))
    if held.bits:
        if held.bounds[1] > read_facts(adapter.model_path).blocks:
            words = f"a model that can be cut as that of {adapter.folder} was, {adapter.cut}"
            raise SettingError("model", adapter.model, words)
        check_quantization(held)
    base = open_base(adapter.model_path, adapter.dtype, device)
    return quantize_whole(base, held.bounds, held.bits, device, dense) if held.bits else base


def read_fitting(adapter: Adapter, base: Any) -> Adapters:
    """Reads an adapter, and makes sure that it fits a model.

    Raises:
        InputError: It has a layer that the model has not, or one of another shape, or cannot be read.
    """
    try:
        read = lora.load(adapter.folder)
    except Exception as error:  # noqa: BLE001  # whatever the libraries make of a broken file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"the adapter in {adapter.folder} cannot be read ({reason})") from None
    modules = dict(base.named_modules())
    for layer in read.complete:
        change, facts = read.change(layer), read.layers[layer]
        wanted = change.shape[::-1] if facts.transposed else change.shape
        found = _shape(modules[layer]) if layer in modules else None
        if found != wanted:
            words = "which the model has not" if found is None else f"which is {found} in the model, not {wanted}"
            raise InputError(f"the adapter in {adapter.folder} does not fit the model: it changes {layer}, {words}")
    return read


def _shape(module: Any) -> tuple[int, ...]:
    """The shape of a projection's weight in the unsplit model; a quantised one tells nothing by its own."""
    if is_quantized(module):
        shape = module.out_features, module.in_features
        return shape[::-1] if was_transposed(module) else shape
    return tuple(module.weight.shape)


def attach(base: Any, adapter: Adapter) -> Any:
    """A base model with an adapter on it, by PEFT.

    Raises:
        InputError: The adapter does not fit.
    """
    read_fitting(adapter, base)
    return PeftModel.from_pretrained(base, str(adapter.folder)).eval()


@torch.no_grad()
def score(model: Any, batches: Iterable[Tensor]) -> Score:
    """Measures a causal LM.

    Args:
        model: The library's, with or without an adapter; computes in the type of its weights.
        batches: Tokens (B, T) each.
    """
    narrow, device = next(model.parameters()).dtype, device_of(model)
    total = Score()
    for ids in batches:
        ids = ids.to(device)
        with torch.autocast(device.type, narrow, enabled=narrow != torch.float32):
            logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        labels = ids[:, 1:].flatten()
        nats = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none").double().sum()
        total += Score(float(nats), int((logits.argmax(-1) == labels).sum()), labels.numel())
    return total
