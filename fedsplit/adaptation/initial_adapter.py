"""The initial adapter of a run: a PEFT adapter of the unsplit model, written into each part at the run's ranks.

Every party reads the folder of the adapter, so that all parties start from equal values and nothing has to cross. The
initial adapter comes to the run's rank and scaling by the rule for clients of mixed ranks (`Adapters.with_rank`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from peft import PeftConfig
from torch import Tensor

from fedsplit.adaptation import adapter_files, lora, prompts
from fedsplit.adaptation.methods import method_of
from fedsplit.model.head import HEAD
from fedsplit.model.parts import Part
from fedsplit.settings.config import Config
from fedsplit.updates import Adapters

HEAD_BASE = f"{HEAD}.base_layer.weight"
"""Name of the head's base weight, which PEFT writes beside an adapter on the head. A run reads the checkpoint's."""


def place(part: Part, config: Config) -> None:
    """Writes the initial values of the run into a part's adapter.

    Args:
        part: The part, with an adapter of the run's kind on it.
        config: Settings of the run. `init_adapter` names a folder that `fedsplit.results.initial` has checked.

    Raises:
        KeyError: The folder lacks a tensor of the part.
    """
    drawn = lora.read(part)
    initial = resized(read(config, part), drawn)
    lora.write({name: initial[name] for name in drawn.tensors}, part)  # the file has the layers of all parts


def read(config: Config, part: Part | None = None) -> Adapters:
    """Reads the adapter that a run starts from.

    Args:
        config: Settings of the run.
        part: Any part of the model, for the sizes of past keys and values; None for adapters other than prompts.

    Returns:
        The whole model's adapter by exported name, at the ranks of the file.
    """
    folder = Path(config.init_adapter)
    if config.prompt.kind == "off":
        return adapter_files.load(folder, skipped=[HEAD_BASE])
    saved = prompts.load(folder).tensors[prompts.SAVED]
    if part is None:
        return Adapters({prompts.SAVED: saved}, {})
    _, named = prompts.embeddings(saved, config.prompt, part.config)
    return Adapters(named, {})


def resized(start: Adapters, made: Adapters) -> dict[str, Tensor]:
    """Returns an adapter at the ranks and scalings of a second adapter.

    A larger rank is truncated, and a smaller rank padded with zeros. B is multiplied by the ratio of the scalings, so
    that s * B @ A keeps every remaining term. At equal ranks and scalings, every value stays to the bit.

    Args:
        start: The adapter.
        made: The second adapter, with the wanted ranks and scalings.

    Example:
        A layer of rank 1 with alpha 4 becomes one of rank 2 with alpha 2: a quarter of the scaling, four times B.

        >>> import torch
        >>> from fedsplit.updates import Layer
        >>> def layer(rank, alpha):
        ...     factors = {"h.lora_A.weight": torch.ones(rank, 3), "h.lora_B.weight": torch.ones(3, rank)}
        ...     return Adapters(factors, {"h": Layer(alpha, transposed=False)})
        >>> resized(layer(rank=1, alpha=4.0), layer(rank=2, alpha=2.0))["h.lora_B.weight"][0]
        tensor([4., 0.])
    """
    tensors = dict(start.tensors)
    for name, wanted in made.layers.items():
        if name not in start.layers:
            continue
        rank = made.rank(name)
        # Each layer by itself, since the file's layers may differ in rank.
        layer = replace(start, layers={name: start.layers[name]}).with_rank(rank)
        a, b = layer.factors(name)
        tensors[f"{name}.lora_A.weight"] = a
        tensors[f"{name}.lora_B.weight"] = b * (layer.scaling(name) / wanted.scaling(rank))
    return tensors


def more_than_factors(config: Config) -> str:
    """Describes an effect of the initial adapter beyond adding s * B @ A to layers, or returns "" without an effect."""
    filed = PeftConfig.from_pretrained(config.init_adapter)
    return adapter_files.beyond_factors(filed, read(config).tensors)


def can_start(config: Config) -> str:
    """Returns the reason why adapters of a run's kind cannot start from a file, or "" if they can.

    Example:
        >>> can_start(Config())
        ''
    """
    method = method_of(config.lora)
    if method.residual:
        return f"{config.lora.method} starts from the base weights themselves"
    if method.allocates:
        return f"{config.lora.method} begins with more ranks than its file keeps"
    encoded = config.prompt.kind == "ptuning" or config.prompt.projection
    if encoded:
        return "a file has the output of such an encoder, and not the encoder"
    return ""
