"""Checks the adapter that a run is to start from, before anything is loaded: it must fit the model and the settings."""

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
    """Makes sure that a run can start from the adapter that `init_adapter` names.

    Args:
        config: Settings of the run.
        family: Family of its model.
        classes: Classes of texts that the run tells; 0 where it predicts tokens.

    Raises:
        InputError: The folder has no adapter, one that does not fit the model, or one that the settings do not make.
    """
    if not config.init_adapter:
        return
    if reason := initial_adapter.can_start(config):
        raise SettingError("init_adapter", config.init_adapter, f"none here, since {reason}")
    folder = Path(config.init_adapter)
    if not (folder / ADAPTER_FILES[0]).is_file():
        words = "the folder of a PEFT adapter of the unsplit model, such as RUN/adapter"
        raise SettingError("init_adapter", f"{folder} (it has no {ADAPTER_FILES[0]})", words)
    check_files(folder)
    filed = read_fitting(Adapter(folder, config.model, config.dtype, folder.name))
    _check_kind(config, family)
    _check_head(config, filed, classes)
    made = _outline(config)
    if made is not None:
        _check_layers(config, initial_adapter.read(config), made)


def stated(config: Config) -> list[str]:
    """Returns the lines that tell what a run starts from; none where it starts from the seed alone."""
    if not config.init_adapter:
        return []
    made = _outline(config)
    resizing = _resizing(initial_adapter.read(config), made) if made is not None else ""
    return [f"starts from the adapter in {config.init_adapter}{resizing}"]


def _outline(config: Config) -> Adapters | None:
    """Returns the adapter that a run trains, without values; None where it cannot be told before weights are loaded."""
    if config.prompt.kind != "off":
        return None
    try:
        return run_adapters.outline(config, ["bottom", "trunk", "top"])
    except (NotImplementedError, RuntimeError):  # a kind that looks at the weights
        return None


def _check_kind(config: Config, family: Family) -> None:
    """Makes sure that an adapter is of the kind that the run trains.

    LoRA's may differ in rank and scaling, since these can be changed. Of another kind every field must be equal.

    Raises:
        SettingError: It is of another kind.
    """
    folder, method = Path(config.init_adapter), method_of(config.lora)
    if config.prompt.kind == "off" and method.factors:
        if more := initial_adapter.more_than_factors(config):
            words = "one that adds s * B @ A to layers, and does nothing else, as the run's adapters do"
            raise SettingError("init_adapter", f"{folder} ({more})", words)
        return
    difference = run_adapters.difference(folder, config, family, ignored=[method.dropout])
    if difference is not None:
        name, value, wanted = difference
        words = f"an adapter of the kind that the run trains, whose {name} is {wanted}"
        raise SettingError("init_adapter", f"{folder} (its {name} is {value})", words)


def _check_head(config: Config, filed: Adapters, classes: int) -> None:
    """Makes sure that an adapter has a head of as many classes as the run tells, and the base weight of its model.

    Raises:
        SettingError: It has another head, or none.
    """
    found = classes_in(filed)
    if found != classes:
        given = f"{config.init_adapter} ({_tells(found)})"
        raise SettingError("init_adapter", given, f"an adapter that {_tells(classes)}, as the run does")
    base = filed.tensors.get(initial_adapter.HEAD_BASE)
    if base is None:
        return
    model = CheckpointReader(weights_folder(config), empty_model(config_folder(config.model)), base.dtype)
    if not torch.equal(base, model.parameter(HEAD_WEIGHT)):
        given = f"{config.init_adapter} (its {initial_adapter.HEAD_BASE} is not the model's)"
        raise SettingError("init_adapter", given, "an adapter that leaves the base weights as they are")


def _tells(classes: int) -> str:
    return f"tells {classes} classes" if classes else "predicts tokens"


def _check_layers(config: Config, start: Adapters, made: Adapters) -> None:
    """Makes sure that an adapter has the layers that the run trains, and no others.

    Raises:
        SettingError: It has other layers, or factors whose rank cannot be changed.
    """
    folder = config.init_adapter
    resized = initial_adapter.resized(start, made)
    resized.pop(lora.SCORE_WEIGHT, None)
    words = "an adapter with the layers that the run trains; see --lora.targets and --lm-head"
    if missing := sorted(made.tensors.keys() - resized.keys()):
        raise SettingError("init_adapter", f"{folder} (it lacks {missing[0]})", words)
    if more := sorted(resized.keys() - made.tensors.keys()):
        raise SettingError("init_adapter", f"{folder} (it has {more[0]})", words)
    _check_shapes(folder, resized, made.tensors)


def _check_shapes(folder: str, resized: Mapping[str, Tensor], made: Mapping[str, Tensor]) -> None:
    """Makes sure that tensors have the shapes of the run's.

    Raises:
        SettingError: One has another, since its rank cannot be changed.
    """
    for name, shape in ((name, tuple(tensor.shape)) for name, tensor in made.items()):
        if tuple(resized[name].shape) != shape:
            given = f"{folder} ({name} is {tuple(resized[name].shape)})"
            raise SettingError("init_adapter", given, f"an adapter in which it is {shape}")


def _resizing(start: Adapters, made: Adapters) -> str:
    """Says in words how the ranks of an adapter change; "" where they stay."""
    changes = {(start.rank(name), made.rank(name)) for name in made.layers}
    changed = sorted((old, new) for old, new in changes if old != new)
    if not changed:
        return ""
    words = [f"{old} {'cut' if old > new else 'filled with zeros'} to {new}" for old, new in changed]
    return f"; ranks: {', '.join(words)}"
