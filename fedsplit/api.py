"""The door from Python: `fedsplit.run` runs a federation, `fedsplit.open` opens the folder of an earlier run."""

from __future__ import annotations

import itertools
import os
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

from fedsplit.environment import prepare
from fedsplit.errors import InputError, SettingError, kind_of
from fedsplit.loading import OBJECT
from fedsplit.objects import Objects
from fedsplit.result import Result
from fedsplit.results.finished import open_run
from fedsplit.settings.config import OPTIONS, SECTIONS, SETTINGS, SEVERAL, Config
from fedsplit.settings.documents import by_key, dotted, set_by_user
from fedsplit.settings.flags import Options, settle


def run(
    config: Config | str | os.PathLike[str] | None = None,
    *,
    strategy: object = None,
    dataset: object = None,
    model: object = None,
    tokenizer: object = None,
    sinks: Iterable[object] = (),
    objective: object = None,
    metrics: Iterable[object] = (),
    **settings: object,
) -> Result:
    """Runs a federation.

    Args:
        config: Settings to begin with: a `Config`, or the path of a TOML file. Keywords win over `config`.
        strategy: Name of a strategy, an object with the methods `init` and `aggregate`, or a strategy of Flower.
        dataset: Name or path of a data set, a `datasets.Dataset` or `DatasetDict`, or a dict of lists of texts by
            client. With a dict, each client trains on its list.
        model: Name or folder of a model, a loaded `transformers.PreTrainedModel`, or a pair of a loaded model and its
            tokenizer.
        tokenizer: Tokenizer of a loaded model.
        sinks: Names of sinks, or objects with the methods `handle` and `close` (`fedsplit.events.Sink`).
        objective: Name of an objective, or a function of logits and labels.
        metrics: Names of metrics, or functions of logits and labels. Objectives and metrics as functions need
            `engine="local"`, since no object crosses to the processes of the engine `ray`.
        **settings: Any other setting. A setting of a section is written `train={"lr": 3e-4}` or `train__lr=3e-4`, a
            keyword argument of a named strategy `strategy__mu=0.1`, that of a named metric or sink
            `metric__rouge__stem=True` or `metric_options={"rouge": {"stem": True}}`.

    Returns:
        Losses, adapter, summary and folder of the run.

    Raises:
        InputError: A setting or an object is wrong. No file has been written.

    Example:
        >>> import fedsplit
        >>> fedsplit.run(clients=0)
        Traceback (most recent call last):
        fedsplit.errors.SettingError: clients: 0 is not possible; allowed: a whole number from 1 to 2147483647

        docs/python.md shows a whole run, which takes half a minute.
    """
    metric_list = _listed(metrics)
    sink_list = _listed(sinks)
    sink_objects = [sink for sink in sink_list if not _is_name(sink)]
    _check_sinks(sink_objects)

    named = _named_settings(strategy, dataset, objective, metric_list, sink_list)
    if _is_name(model) and tokenizer is None:
        named["model"] = model
    if _is_texts_by_client(dataset):
        settings = {"clients": max(1, len(dataset)), "partition": "natural", **settings}
    full_config = _settled(config, {**settings, **named})
    prepare(full_config.ray.address)

    objects = Objects(
        strategy=None if _is_name(strategy) else strategy,
        objective=objective if callable(objective) else None,
        metrics={_spec_of("metrics", metric): metric for metric in metric_list if not _is_name(metric)},
    )
    _check_objects_can_reach_clients(objects, full_config.engine)
    dataset_object = None if _is_name(dataset) else dataset
    model_object = _model_object(model, tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries warn of much that no user can change; the command is as quiet
        return _run(full_config, objects, dataset_object, model_object, sink_objects)


def open(folder: str | os.PathLike[str]) -> Result:
    """Opens the folder of a finished run.

    Raises:
        InputError: The folder does not exist, is no run's folder, or belongs to a run that did not end.

    Example:
        >>> import fedsplit
        >>> fedsplit.open("nowhere")
        Traceback (most recent call last):
        fedsplit.errors.InputError: nowhere is no folder of a run: there is no such folder
    """
    return Result(open_run(Path(folder)))


def _is_name(value: object) -> TypeGuard[str | os.PathLike[str]]:
    return isinstance(value, str | os.PathLike)


def _is_texts_by_client(dataset: object) -> TypeGuard[Mapping[Any, Any]]:
    """Returns True for texts by client. A `DatasetDict` is a mapping, too, but of splits."""
    return isinstance(dataset, Mapping) and not hasattr(dataset, "save_to_disk")


def _named_settings(
    strategy: object, dataset: object, objective: object, metrics: Sequence[object], sinks: Sequence[object]
) -> dict[str, object]:
    """Returns the settings that stand for arguments of `run`.

    Names stand for themselves. An objective or a metric that is a function gets a name (see `_spec_of`). Any other
    object has no setting.
    """
    named: dict[str, object] = {}
    if _is_name(strategy):
        named["strategy"] = strategy
    if _is_name(dataset):
        named["dataset"] = dataset
    if objective is not None:
        named["objective"] = _spec_of("objective", objective)
    if metrics:
        named["metric"] = [_spec_of("metrics", metric) for metric in metrics]
    sink_names = [sink for sink in sinks if _is_name(sink)]
    if sink_names:
        named["sinks"] = sink_names
    return named


def _check_objects_can_reach_clients(objects: Objects, engine: str) -> None:
    """Makes sure that the clients can call the objective and the metrics.

    Raises:
        SettingError: One of these is an object, and the clients live in processes of their own.
    """
    if engine == "local":
        return
    for setting, functions in (("objective", [objects.objective]), ("metrics", [*objects.metrics.values()])):
        for function in functions:
            if function is not None:
                allowed = "a name, or an object with engine='local': no object crosses to the processes of the clients"
                raise SettingError(setting, kind_of(function), allowed)


def _model_object(model: object, tokenizer: object) -> object:
    """Returns a loaded model, paired with its tokenizer if there is one; None if the model is a name.

    Raises:
        SettingError: A tokenizer is given for a model by name, or for a pair that has a tokenizer.
    """
    if tokenizer is None:
        return None if _is_name(model) else model
    if model is None or _is_name(model) or isinstance(model, tuple):
        raise SettingError("tokenizer", f"one of {type(tokenizer).__name__}", "one together with a loaded model")
    return model, tokenizer


def _listed(values: object) -> list[Any]:
    """Returns the values of an iterable as a list. A single value, such as a name, becomes a list of one."""
    if _is_name(values) or not isinstance(values, Iterable):
        return [values]
    return list(values)


def _check_sinks(sinks: Iterable[object]) -> None:
    """Makes sure that objects can receive events.

    Raises:
        SettingError: An object lacks a method of a sink, or is a class.
    """
    for sink in sinks:
        if isinstance(sink, type) or not (hasattr(sink, "handle") and hasattr(sink, "close")):
            allowed = "the name of a class, or an object with the methods handle and close"
            raise SettingError("sinks", kind_of(sink), allowed)


def _spec_of(name: str, value: object) -> str:
    """Returns the name of an objective or a metric for the settings.

    Args:
        name: Keyword of `run` that the value was passed by.
        value: A name, or a function. The name of a function ends with `(...)`, since no other process can find the
            function by it.

    Raises:
        SettingError: The value is neither a name nor a function.
    """
    if _is_name(value):
        return os.fspath(value)
    if isinstance(value, type) or not callable(value):
        raise SettingError(name, kind_of(value), "a name, or a function of logits and labels")
    # An object with `__call__` has no name; its class has.
    qualified_name = getattr(value, "__qualname__", type(value).__qualname__)
    module = value.__module__
    return f"{module}:{qualified_name}{OBJECT}"


def _settled(config: Config | str | os.PathLike[str] | None, keywords: Mapping[str, Any]) -> Config:
    """Makes a configuration from keywords, on top of a configuration or a file.

    Raises:
        InputError: A name is unknown, or a value is not allowed.
    """
    values, options = _by_dotted_name(keywords)
    if config is None:
        return settle(values, options)
    if isinstance(config, Config):
        base_values, base_options = _set_in(config)
        merged = {setting: {**base_options[setting], **options[setting]} for setting in OPTIONS}
        return settle({**base_values, **values}, merged)
    if _is_name(config):
        return settle(values, options, Path(config))
    raise SettingError("config", kind_of(config), "a Config, or the path of a TOML file")


def _by_dotted_name(keywords: Mapping[str, Any]) -> tuple[dict[str, object], Options]:
    """Returns the settings among keywords by dotted name, and the options of the classes that they name.

    Raises:
        SettingError: The options are no mapping.
    """
    options: Options = {}
    for setting, table in OPTIONS.items():
        given = keywords.get(table, {})
        if not isinstance(given, Mapping):
            raise SettingError(table, given, "a table")
        options[setting] = by_key(given) if setting in SEVERAL else dict(given)

    values: dict[str, Any] = {}
    for keyword, value in keywords.items():
        section, _, field = keyword.partition("__")
        if keyword in OPTIONS.values():
            continue
        if section in SEVERAL and field:  # metric__rouge__stem
            options[section][field.replace("__", ".", 1)] = value
        elif section in OPTIONS and field:  # strategy__mu
            options[section][field] = value
        elif field:  # train__lr
            values[f"{section}.{field}"] = value
        elif section in SECTIONS and isinstance(value, SECTIONS[section]):  # train=TrainSettings(…)
            values |= {f"{section}.{name}": inner for name, inner in set_by_user(value).items()}
        elif isinstance(value, Mapping):  # train={"lr": …}
            values[keyword] = dict(value)
        else:
            values[keyword] = value
    plain = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in values.items()}
    return dotted(plain), options


def _set_in(config: Config) -> tuple[dict[str, object], Options]:
    """Returns the settings of a configuration that differ from their defaults, and the options."""
    values = {}
    for name, setting in SETTINGS.items():
        value = config.value_of(setting)
        if value != setting.default:
            values[name] = value
    options = {setting: dict(getattr(config, table)) for setting, table in OPTIONS.items()}
    return values, options


def _run(config: Config, objects: Objects, dataset: object, model: object, sinks: Sequence[Any]) -> Result:
    """Runs a federation.

    Args:
        config: Settings of the run.
        objects: Strategy, objective and metrics that are objects.
        dataset: Data set that is an object; None if the settings name a data set.
        model: Model that is an object; None if the settings name a model.
        sinks: Sinks that are objects.
    """
    # Both modules load libraries that read the environment, which `run` has prepared by now.
    from fedsplit import inputs
    from fedsplit.commands import simulate

    if objects.strategy is not None:
        config = replace(config, **inputs.strategy_settings(objects.strategy))
    if config.resume:
        for name, given in (("dataset", dataset), ("model", model)):
            if given is not None:
                raise InputError(f"{name} cannot be set for a run that goes on: its folder has it already")
        simulate.run(config, objects=objects, sinks=sinks)
        return open(config.resume)
    folder = Path(config.out) if config.out else _free_folder()
    with inputs.written(folder, model, dataset) as written_settings:
        config = replace(config, out=str(folder), **written_settings)
        simulate.run(config, objects=objects, sinks=sinks)
    return open(folder)


def _free_folder() -> Path:
    """Returns a new folder's path: `runs/` and the time, with a number if a run of the same second has the name."""
    now = time.strftime("%Y-%m-%d_%H-%M-%S")
    folder = Path("runs", now)
    for number in itertools.count(2):
        if not folder.exists():
            break
        folder = Path("runs", f"{now}-{number}")
    return folder
