"""A run's parts by its settings: how they are held, which adapter they get, LoRA or virtual tokens, and its files."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor

from fedsplit.adaptation import initial_adapter, lora, prompts
from fedsplit.adaptation.injection import make_config
from fedsplit.adaptation.methods import method_of
from fedsplit.adaptation.rank_allocation import adapted_layers
from fedsplit.adaptation.rank_budget import budget_of, for_file
from fedsplit.allowed import InputError
from fedsplit.config import Config
from fedsplit.model.devices import TYPES, resolve
from fedsplit.model.families import Family
from fedsplit.model.head import HEAD
from fedsplit.model.parts import SCORE, Kind, Part
from fedsplit.model.sources import about, weights
from fedsplit.model.split import empty_part, load_parts
from fedsplit.updates import Adapters, Layer

_OF_THE_FILE = frozenset(
    {
        *("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "task_type"),
        *("rank_pattern", "alpha_pattern", "fan_in_fan_out", "target_parameters", "runtime_config"),
    }
)
"""Fields of PEFT's configurations that follow from what trained, not from settings."""


def bare_parts(config: Config, kinds: Sequence[Kind], classes: int = 0) -> list[Any]:
    """Parts as a run holds them, without adapters.

    Args:
        config: The run's.
        kinds: The parts of one party, which are on one device.
        classes: As for `load_parts`.

    Raises:
        SettingError: There is no such model, or it cannot be had.
    """
    return load_parts(
        weights(config, kinds),
        config.bounds,
        kinds,
        TYPES[config.dtype],
        config.kernels,
        classes=classes,
        device=resolve(config.device_of(kinds[0])),
        bits=config.bits,
    )


def outline(config: Config, kinds: Sequence[Kind]) -> Adapters:
    """The adapters that parts will have, without values: no weight of the model is read.

    Args:
        config: The run's; it asks for neither virtual tokens nor adapters that are computed from the base weights.
        kinds: The parts.

    Returns:
        Tensors on the meta device.
    """
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Layer] = {}
    for kind in kinds:
        part = empty_part(about(config), config.bounds, kind, TYPES[config.dtype], config.kernels == "fused", classes=0)
        part.requires_grad_(False)
        with torch.device("meta"):
            _add(part, config)
        tensors |= {name: parameter.detach() for name, parameter in lora.parameters(part).items()}
        layers |= lora.layers_of(part)
    return Adapters(tensors, layers)


def adapt(part: Part, config: Config) -> None:
    """Puts on a part what trains, in place; its base weights must be frozen already.

    Training starts from the adapter that the settings name, if they name one.
    """
    _add(part, config)
    if config.init_adapter:
        initial_adapter.place(part, config)


def _add(part: Part, config: Config) -> None:
    """Puts an adapter on a part that starts from nothing but the seed."""
    if config.prompt.kind == "off":
        lora.add(part, config.lora, config.seed, config.lm_head)
        if method_of(config.lora).allocates:
            part.budget = budget_of(config, part.kind, adapted_layers(config, part.family))
    else:
        prompts.add(part, config.prompt, config.seed, about(config))


def of_part(whole: Adapters, config: Config, family: Family, kind: Kind, blocks: range) -> Adapters:
    """What of the whole model's adapters belongs to a part.

    Args:
        whole: By exported name, with what was folded.
        config: The run's.
        family: The model's family.
        kind: The part.
        blocks: Its blocks.
    """
    if config.prompt.kind != "off":
        return Adapters(prompts.of_part(whole.tensors, kind, blocks), {})
    prefixes = tuple(f"{family.decoder}.{family.blocks}.{block}." for block in blocks)
    if kind == "top":
        prefixes += (HEAD, SCORE)
    folded = {layer: change for layer, change in whole.folded.items() if layer.startswith(prefixes)}
    layers = {layer: facts for layer, facts in whole.layers.items() if layer.startswith(prefixes)}
    tensors = {name: tensor for name, tensor in whole.tensors.items() if name.startswith(prefixes)}
    return Adapters(tensors, layers, folded)


def save(
    folder: Path,
    adapters: Adapters,
    config: Config,
    family: Family,
    kind: Kind | None = None,
    blocks: range | None = None,
) -> None:
    """Writes an adapter of the unsplit model that PEFT opens.

    Args:
        folder: Where to; made if it is not there.
        adapters: The whole model's, or a part's (`of_part`).
        config: The run's.
        family: The model's family.
        kind: The part whose they are; all where None.
        blocks: Its blocks.
    """
    if config.prompt.kind != "off":
        prompts.save(folder, adapters.tensors, config.prompt, about(config), config.model, blocks)
    else:
        head = config.lm_head if kind in (None, "top") else "frozen"
        lora.save(folder, adapters, for_file(config), family, config.model, blocks, config.seed, head)


def load(folder: Path) -> Adapters:
    """Reads an adapter of the unsplit model that `save`, or PEFT itself, wrote."""
    return lora.load(folder) if prompts.kind_of(folder) is None else prompts.load(folder)


def check_made_by(folder: Path, config: Config, family: Family) -> None:
    """Makes sure that a finished run's adapter is of the kind that the run's settings make, which parts can take over.

    Args:
        folder: The adapter's.
        config: The run's.
        family: The model's family.

    Raises:
        InputError: It is another one.
    """
    found = difference(folder, config, family)
    if found is not None:
        name, value, wanted = found
        words = f"its {name} is {value}, by the run's settings {wanted}"
        raise InputError(f"the adapter in {folder} is not what its run made: {words}")


def difference(
    folder: Path, config: Config, family: Family, ignored: Collection[str | None] = ()
) -> tuple[str, object, object] | None:
    """Returns the first field in which an adapter's file differs from what a run's settings make.

    Args:
        folder: The adapter's.
        config: The run's.
        family: The model's family.
        ignored: Names of fields that may differ.

    Returns:
        Name of the field, its value in the file, and its value by the settings; None where no field differs.
    """
    filed = PeftConfig.from_pretrained(str(folder))
    if config.prompt.kind != "off":
        wanted: dict[str, Any] = {"peft_type": prompts.PEFT_TYPES[config.prompt.kind]}
        wanted["num_virtual_tokens"] = config.prompt.tokens
    else:
        made = make_config(for_file(config), family, None, config.seed, config.lm_head)
        if method_of(config.lora).residual:
            made.init_lora_weights = True  # as `lora.save` has it
        wanted = {entry.name: getattr(made, entry.name) for entry in fields(made) if entry.name not in _OF_THE_FILE}
    for name, value in wanted.items():
        found = getattr(filed, name, None)
        if name == "modules_to_save":
            found, value = ({*(some or ())} - {SCORE} for some in (found, value))
        if name not in ignored and _word(found) != _word(value):
            return name, _word(found), _word(value)
    return None


def _word(value: object) -> object:
    """A value of PEFT's, alike whether it comes from a file or not: JSON has no sets, tuples and enumerations."""
    if isinstance(value, set | list | tuple):
        return ",".join(sorted(map(str, value))) or None
    return getattr(value, "value", value)


def adopt(folder: Path, config: Config, *parts: Part) -> None:
    """Puts a finished run's adapter on parts, whose base weights are as they were loaded.

    Args:
        folder: The adapter's, of the unsplit model.
        config: The run's. Of virtual tokens and prefixes the file has what encoders made, which is put in their place.
        *parts: The parts; what belongs to others is passed over.
    """
    whole = load(folder)
    if config.prompt.kind != "off":
        settings, named = prompts.embeddings(whole.tensors[prompts.SAVED], config.prompt, parts[0].config)
        config, whole = replace(config, prompt=settings), Adapters(named, {})
    if method_of(config.lora).residual:  # the file has as factors, too, what was taken out of the base weights
        config = replace(config, lora=replace(config.lora, method="lora", options=""))
    for part in parts:
        _add(part, config)
    lora.adopt(whole, *parts)
