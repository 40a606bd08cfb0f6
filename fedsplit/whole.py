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
from fedsplit.config import InputError
from fedsplit.families import read_facts
from fedsplit.finished import Adapter
from fedsplit.split import TYPES, check_checkpoint, load_whole
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


def open_base(model_path: Path, dtype: str) -> Any:
    """The base model as a run held it.

    Args:
        model_path: Its folder.
        dtype: One of `fedsplit.config.DTYPES`.

    Raises:
        SettingError: The folder holds no model, or a broken one.
    """
    read_facts(model_path)
    check_checkpoint(model_path)
    return load_whole(model_path, TYPES[dtype]).eval()


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
        found = tuple(modules[layer].weight.shape) if layer in modules else None
        if found != wanted:
            words = "which the model has not" if found is None else f"which is {found} in the model, not {wanted}"
            raise InputError(f"the adapter in {adapter.folder} does not fit the model: it changes {layer}, {words}")
    parameters = dict(base.named_parameters())
    for layer in read.stacked:
        name, changes = read.weight_name(layer), read.changes(layer)
        shape = len(changes), *changes[0].shape
        if name not in parameters or parameters[name].shape != shape:
            words = f"which is no {' x '.join(map(str, shape))} in the model"
            raise InputError(f"the adapter in {adapter.folder} does not fit the model: it changes {name}, {words}")
    return read


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
    narrow = next(model.parameters()).dtype
    total = Score()
    for ids in batches:
        with torch.autocast("cpu", narrow, enabled=narrow != torch.float32):
            logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        labels = ids[:, 1:].flatten()
        nats = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none").double().sum()
        total += Score(float(nats), int((logits.argmax(-1) == labels).sum()), labels.numel())
    return total
