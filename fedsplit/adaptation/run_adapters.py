"""Parts and adapters by the settings of a run: adapters in the layers, or virtual tokens and prefixes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftConfig
from torch import Tensor, nn

from fedsplit.adaptation import adapter_files, initial_adapter, lora, prompts
from fedsplit.adaptation.injection import make_config
from fedsplit.adaptation.methods import method_of
from fedsplit.adaptation.rank_allocation import adapted_layers
from fedsplit.adaptation.rank_budget import budget_of, for_file
from fedsplit.errors import InputError
from fedsplit.model.devices import TYPES, resolve, trunk_devices
from fedsplit.model.families import Family
from fedsplit.model.head import HEAD
from fedsplit.model.parts import SCORE, Kind, Part
from fedsplit.model.process_group import Shard
from fedsplit.model.sources import config_folder, weights_folder
from fedsplit.model.split import empty_part, load_parts
from fedsplit.settings.config import Config
from fedsplit.updates import Adapters, Layer, fresh_factor

T = TypeVar("T")

_FILE_FIELDS = frozenset(
    {
        *("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "task_type"),
        *("rank_pattern", "alpha_pattern", "fan_in_fan_out", "target_parameters", "runtime_config"),
    }
)
"""Fields of PEFT's configurations that do not follow from a run's settings."""


def bare_parts(
    config: Config,
    kinds: Sequence[Kind],
    classes: int = 0,
    shard: Shard | None = None,
) -> list[Any]:
    """Loads parts by the settings of a run, without adapters.

    Args:
        config: Settings of the run.
        kinds: Parts of one party, on a common device.
        classes: Number of classes, as for `fedsplit.model.split.load_parts`.
        shard: Place of this process among several that share the trunk; None for a process with whole parts.

    Raises:
        SettingError: The model does not exist, or cannot be fetched.

    Example:
        >>> bottom, top = bare_parts(Config(), ["bottom", "top"])
        >>> len(bottom.blocks), len(top.blocks)
        (1, 1)
    """
    return load_parts(
        weights_folder(config, kinds),
        config.bounds,
        kinds,
        TYPES[config.dtype],
        config.kernels,
        classes=classes,
        device=resolve(config.device_of(kinds[0]), shard.rank if shard else 0),
        bits=config.bits,
        devices=trunk_devices(config) if [*kinds] == ["trunk"] else (),
        shard=shard,
    )


def outline(config: Config, kinds: Sequence[Kind]) -> Adapters:
    """Returns the adapters of parts, without values. No weight of the model is read.

    Args:
        config: Settings of the run.
        kinds: The parts.

    Returns:
        The adapters, with tensors on the meta device.
    """
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Layer] = {}
    for kind in kinds:
        part = outlined(config, kind)
        tensors |= {name: parameter.detach() for name, parameter in lora.parameters(part).items()}
        layers |= lora.layers_of(part)
    return Adapters(tensors, layers)


def outlined(config: Config, kind: Kind, classes: int = 0) -> Any:
    """Returns a part with adapters, on the meta device. No weight of the model is read.

    Args:
        config: Settings of the run.
        kind: The part.
        classes: Number of classes, as for `fedsplit.model.split.load_parts`.

    Example:
        >>> sum(parameter.numel() for parameter in outlined(Config(), "trunk").parameters())
        858624
    """
    config = _without_values(config)
    folder = config_folder(config.model, weights=False)
    dtype = TYPES[config.dtype]
    fused = config.kernels == "fused"
    part = empty_part(folder, config.bounds, kind, dtype, fused, classes)
    part.requires_grad_(False)  # adapters are added to frozen base weights only
    with torch.device("meta"):
        _add(part, config)
    return part


def weightless(config: Config, kind: Kind) -> Part:
    """Returns a part with LoRA adapters that start as in `adapt`, and without base weights. No weight is read.

    Args:
        config: Settings of the run, with a method whose adapters do not depend on the base weights.
        kind: The part.

    Returns:
        The part, with base weights on the meta device and adapters on the CPU.
    """
    folder = config_folder(config.model)
    dtype = TYPES[config.dtype]
    fused = config.kernels == "fused"
    part = empty_part(folder, config.bounds, kind, dtype, fused, classes=0)
    part.requires_grad_(False)
    with torch.device("meta"):
        _add(part, config)
    for name, parameter in lora.local_parameters(part).items():
        module, _, leaf = name.rpartition(".")
        exported = lora.exported_name(part, name)
        is_drawn = ".lora_A." in exported
        value = fresh_factor(exported, parameter.shape, config.seed) if is_drawn else torch.zeros(parameter.shape)
        setattr(part.get_submodule(module), leaf, nn.Parameter(value))  # a tensor on the meta device cannot be filled
    if config.init_adapter:
        initial_adapter.place(part, config)
    return part


def _without_values(config: Config) -> Config:
    """Returns settings for adapters with the same names and shapes, and a start without values of the model.

    An adapter that starts from a decomposition of the base weights has the form of LoRA. Virtual tokens have the same
    form for every start.
    """
    if method_of(config.lora).residual:
        config = replace(config, lora=replace(config.lora, method="lora"))
    return replace(config, prompt=replace(config.prompt, init="random"))


def adapt(part: Part, config: Config) -> None:
    """Adds adapters by the settings of a run to a part, in place.

    With `--init-adapter`, the adapters start from the values of the initial adapter.

    Args:
        part: The part, with frozen base weights.
        config: Settings of the run.
    """
    _add(part, config)
    if config.init_adapter:
        initial_adapter.place(part, config)


def _add(part: Part, config: Config) -> None:
    """Adds adapters to a part, in place. All initial values follow from the seed."""
    if config.prompt.kind != "off":
        prompts.add(part, config.prompt, config.seed, config_folder(config.model, weights=False))
        return
    lora.add(part, config.lora, config.seed, config.lm_head)
    if method_of(config.lora).allocates:
        layers = adapted_layers(config, part.family)
        part.rank_budget = budget_of(config, part.kind, layers)


def of_part(
    adapters: Adapters,
    config: Config,
    family: Family,
    kind: Kind,
    blocks: range,
) -> Adapters:
    """Selects the adapters of one part from the adapters of the unsplit model.

    Args:
        adapters: Adapters of the unsplit model.
        config: Settings of the run.
        family: Record of the model family.
        kind: The part.
        blocks: Numbers of the part's blocks.
    """
    if config.prompt.kind != "off":
        return Adapters(prompts.of_part(adapters.tensors, kind, blocks), {})
    # With the dot behind the number: block 1 must not stand for block 10.
    prefixes = tuple(f"{family.decoder}.{family.blocks}.{block}." for block in blocks)
    if kind == "top":
        prefixes += (HEAD, SCORE)

    def select(named: Mapping[str, T]) -> dict[str, T]:
        return {name: value for name, value in named.items() if name.startswith(prefixes)}

    return Adapters(
        tensors=select(adapters.tensors),
        layers=select(adapters.layers),
        folded=select(adapters.folded),
    )


def save(
    folder: Path,
    adapters: Adapters,
    config: Config,
    family: Family,
    kind: Kind | None = None,
    blocks: range | None = None,
) -> None:
    """Writes adapters as a PEFT adapter of the unsplit model.

    Args:
        folder: Folder to write to. It is created if needed.
        adapters: Adapters of the unsplit model, or of one part (`of_part`).
        config: Settings of the run.
        family: Record of the model family.
        kind: The part of the adapters; None for the unsplit model.
        blocks: Numbers of the part's blocks; None for the unsplit model.
    """
    if config.prompt.kind != "off":
        model_folder = config_folder(config.model)
        prompts.save(
            folder,
            adapters.tensors,
            config.prompt,
            model_path=model_folder,
            base=config.model,
            blocks=blocks,
            dtype=config.dtype,
        )
        return
    head = config.lm_head if kind in (None, "top") else "frozen"  # bottom and trunk have no head to name
    adapter_files.save(
        folder,
        adapters,
        for_file(config),
        family,
        base=config.model,
        blocks=blocks,
        seed=config.seed,
        head=head,
        dtype=config.dtype,
    )


def load(folder: Path) -> Adapters:
    """Reads an adapter of the unsplit model, written by `save` or PEFT."""
    is_in_layers = prompts.kind_of(folder) is None
    return adapter_files.load(folder) if is_in_layers else prompts.load(folder)


def check_made_by(folder: Path, config: Config, family: Family) -> None:
    """Checks that the configuration of a finished run's adapter follows from the run's settings.

    Args:
        folder: Folder of the adapter.
        config: Settings of the run.
        family: Record of the model family.

    Raises:
        InputError: The configuration differs.
    """
    first_difference = difference(folder, config, family)
    if first_difference is not None:
        name, actual, expected = first_difference
        reason = f"its {name} is {actual}, by the run's settings {expected}"
        raise InputError(f"the adapter in {folder} is not what its run made: {reason}")


def difference(
    folder: Path, config: Config, family: Family, ignored: Collection[str | None] = ()
) -> tuple[str, object, object] | None:
    """Returns the first field of an adapter's configuration that does not follow from settings.

    Args:
        folder: Folder of the adapter.
        config: Settings of a run.
        family: Record of the model family.
        ignored: Names of fields that may differ.

    Returns:
        Name of the field, the value in the file, and the value by the settings; None if no field differs.
    """
    actual_config = PeftConfig.from_pretrained(str(folder))
    if config.prompt.kind != "off":
        expected_values: dict[str, Any] = {
            "peft_type": prompts.PEFT_TYPES[config.prompt.kind],
            "num_virtual_tokens": config.prompt.tokens,
        }
    else:
        expected_config = make_config(for_file(config), family, None, config.seed, config.lm_head)
        if method_of(config.lora).residual:
            expected_config.init_lora_weights = True  # `adapter_files.save` writes True
        names = [entry.name for entry in fields(expected_config) if entry.name not in _FILE_FIELDS]
        expected_values = {name: getattr(expected_config, name) for name in names}

    for name, expected in expected_values.items():
        actual = getattr(actual_config, name, None)
        if name == "modules_to_save":  # a head for classes follows from the data, not from the settings
            actual = {*(actual or ())} - {SCORE}
            expected = {*(expected or ())} - {SCORE}
        if name not in ignored and _comparable(actual) != _comparable(expected):
            return name, _comparable(actual), _comparable(expected)
    return None


def _comparable(value: object) -> object:
    """Returns a value of PEFT's in a form that survives JSON: without sets, tuples or enumerations."""
    if isinstance(value, set | list | tuple):
        # Sorted, since a set of PEFT's has no order.
        return ",".join(sorted(map(str, value))) or None
    return getattr(value, "value", value)


def adopt(folder: Path, config: Config, *parts: Part) -> None:
    """Adds the adapter of a finished run to parts without adapters.

    Args:
        folder: Folder of the adapter of the unsplit model.
        config: Settings of the run. For virtual tokens or prefixes, embeddings with the output of the encoders take the
            place of the encoders.
        *parts: The parts, with unchanged base weights. Adapters of further parts are ignored.
    """
    adapters = load(folder)
    if config.prompt.kind != "off":
        output = adapters.tensors[prompts.SAVED]
        settings, tensors = prompts.embeddings(output, config.prompt, parts[0].config)
        adapters = Adapters(tensors, {})
        config = replace(config, prompt=settings)
    if method_of(config.lora).residual:  # the file's factors contain the part that training took out of the base
        plain = replace(config.lora, method="lora")
        config = replace(config, lora=plain)
    for part in parts:
        _add(part, config)
    lora.adopt(adapters, *parts)
