"""Checks the initial adapter of a run against the model and the settings, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fedsplit.adaptation import initial_adapter, lora, run_adapters
from fedsplit.adaptation.methods import method_of
from fedsplit.errors import SettingError
from fedsplit.model.checkpoint_reader import CheckpointReader
from fedsplit.model.families import Family
from fedsplit.model.head import HEAD_WEIGHT
from fedsplit.model.sources import config_folder, weights_folder
from fedsplit.model.unsplit import empty_model
from fedsplit.results.finished import ADAPTER_FILES, Adapter, check_files
from fedsplit.results.fitting import classes_in, read_fitting
from fedsplit.settings.config import Config
from fedsplit.updates import Adapters


def check_initial(config: Config, family: Family, classes: int = 0) -> None:
    """Checks that a run can start from the adapter in the setting `init_adapter`.

    Args:
        config: Settings of the run.
        family: Record of the model family.
        classes: Number of classes for a classifier; 0 for a model that predicts tokens.

    Raises:
        InputError: The folder has no adapter, or the adapter does not fit the model or the settings.
    """
    if not config.init_adapter:
        return
    reason_against = initial_adapter.can_start(config)
    if reason_against:
        raise SettingError("init_adapter", config.init_adapter, f"none here, since {reason_against}")
    folder = Path(config.init_adapter)
    if not (folder / ADAPTER_FILES[0]).is_file():
        words = "the folder of a PEFT adapter of the unsplit model, such as RUN/adapter"
        raise SettingError("init_adapter", f"{folder} (it has no {ADAPTER_FILES[0]})", words)
    check_files(folder)

    # First against the model alone, then against the settings: the first errors are about the file, not the run.
    stored = read_fitting(Adapter(folder, config.model, config.dtype, folder.name))
    _check_kind(config, family)
    _check_head(config, stored, classes)
    outline = _outline(config)
    if outline is not None:
        _check_layers(config, initial_adapter.read(config), outline)


def stated(config: Config) -> list[str]:
    """Returns lines for the screen about the initial adapter. A run that starts from the seed alone has no line.

    Example:
        >>> stated(Config())
        []
    """
    if not config.init_adapter:
        return []
    line = f"starts from the adapter in {config.init_adapter}"
    outline = _outline(config)
    if outline is not None:
        line += _resizing(initial_adapter.read(config), outline)
    return [line]


def _outline(config: Config) -> Adapters | None:
    """Returns the run's adapter without values, or None if the adapter's shapes depend on the base weights."""
    if config.prompt.kind != "off":
        return None
    try:
        return run_adapters.outline(config, ["bottom", "trunk", "top"])
    except (NotImplementedError, RuntimeError):  # PEFT computed with weights on the meta device
        return None


def _check_kind(config: Config, family: Family) -> None:
    """Checks that the initial adapter is of the same kind as the run's adapter.

    A LoRA may differ in rank and scaling, since both can be changed. For any further kind, every field must be equal.

    Raises:
        SettingError: The adapter is of a different kind.
    """
    folder = Path(config.init_adapter)
    method = method_of(config.lora)
    if config.prompt.kind == "off" and method.factors:
        more = initial_adapter.more_than_factors(config)
        if more:
            words = "one that adds s * B @ A to layers, and does nothing else, as the run's adapters do"
            raise SettingError("init_adapter", f"{folder} ({more})", words)
        return
    difference = run_adapters.difference(folder, config, family, ignored=[method.dropout])
    if difference is not None:
        name, value, wanted = difference
        words = f"an adapter of the kind that the run trains, whose {name} is {wanted}"
        raise SettingError("init_adapter", f"{folder} (its {name} is {value})", words)


def _check_head(config: Config, stored: Adapters, classes: int) -> None:
    """Checks that the initial adapter has a head of the run's number of classes, on the base weight of the model.

    Raises:
        SettingError: The adapter has a different head, or lacks a head.
    """
    found = classes_in(stored)
    if found != classes:
        given = f"{config.init_adapter} ({_tells(found)})"
        raise SettingError("init_adapter", given, f"an adapter that {_tells(classes)}, as the run does")
    # An adapter of a trained head may hold a copy of the head's base weight. The run takes the model's weight instead.
    base = stored.tensors.get(initial_adapter.HEAD_BASE)
    if base is None:
        return
    model = CheckpointReader(weights_folder(config), empty_model(config_folder(config.model)), base.dtype)
    if not torch.equal(base, model.parameter(HEAD_WEIGHT)):
        given = f"{config.init_adapter} (its {initial_adapter.HEAD_BASE} is not the model's)"
        raise SettingError("init_adapter", given, "an adapter that leaves the base weights as they are")


def _tells(classes: int) -> str:
    return f"tells {classes} classes" if classes else "predicts tokens"


def _check_layers(config: Config, initial: Adapters, outline: Adapters) -> None:
    """Checks that the initial adapter has exactly the layers of the run's adapter.

    Args:
        config: Settings of the run.
        initial: The initial adapter.
        outline: The run's adapter, without values.

    Raises:
        SettingError: The layers differ, or a rank cannot be changed.
    """
    folder = config.init_adapter
    resized = initial_adapter.resized(initial, outline)
    resized.pop(lora.SCORE_WEIGHT, None)  # `_check_head` has checked the head
    words = "an adapter with the layers that the run trains; see --lora.targets and --lm-head"
    missing = sorted(outline.tensors.keys() - resized.keys())
    if missing:
        raise SettingError("init_adapter", f"{folder} (it lacks {missing[0]})", words)
    more = sorted(resized.keys() - outline.tensors.keys())
    if more:
        raise SettingError("init_adapter", f"{folder} (it has {more[0]})", words)
    _check_shapes(folder, resized, outline.tensors)


def _check_shapes(folder: str, resized: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Checks that tensors have the shapes of the run's adapter.

    Raises:
        SettingError: A shape differs, since `resized` could not change the rank.
    """
    for name, tensor in expected.items():
        shape = tuple(tensor.shape)
        resized_shape = tuple(resized[name].shape)
        if resized_shape != shape:
            given = f"{folder} ({name} is {resized_shape})"
            raise SettingError("init_adapter", given, f"an adapter in which it is {shape}")


def _resizing(initial: Adapters, outline: Adapters) -> str:
    """Describes the changes of the initial adapter's ranks, or returns "" without a change."""
    ranks = {(initial.rank(name), outline.rank(name)) for name in outline.layers}
    words = []
    for old, new in sorted(ranks):
        if old > new:
            words.append(f"{old} cut to {new}")
        elif old < new:
            words.append(f"{old} filled with zeros to {new}")
    return f"; ranks: {', '.join(words)}" if words else ""
