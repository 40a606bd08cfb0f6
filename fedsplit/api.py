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
from fedsplit.settings.config import LEAVES, OPTIONS, SECTIONS, Config
from fedsplit.settings.documents import dotted, set_by_user
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
        config: Settings to begin with: a `Config`, or the path of a TOML file. Keywords win over them.
        strategy: Name of a strategy, an object with the methods `init` and `aggregate`, or a strategy of Flower's.
        dataset: Name or path of a data set, a `datasets.Dataset` or `DatasetDict`, or a dict of lists of texts by
            client, which gives each client its own.
        model: Name or folder of a model, a loaded `transformers.PreTrainedModel`, or a pair of one and its tokenizer.
        tokenizer: Tokenizer of a loaded model.
        sinks: Names of sinks, or objects with the methods `handle` and `close` (`fedsplit.events.Sink`).
        objective: Name of an objective, or a function of logits and labels.
        metrics: Names of metrics, or functions of logits and labels. Objectives and metrics as objects need
            `engine="local"`: no object crosses to the processes of `ray`.
        **settings: Any other setting. One of a section is written `train={"lr": 3e-4}` or `train__lr=3e-4`, and a
            keyword argument of a strategy that is given by name `strategy__mu=0.1`.

    Returns:
        Losses, adapter, summary and folder of the run.

    Raises:
        InputError: Something was given wrongly. No file has been written.

    Example:
        >>> import fedsplit
        >>> fedsplit.run(clients=0)
        Traceback (most recent call last):
        fedsplit.errors.SettingError: clients: 0 is not possible; allowed: a whole number from 1 to 2147483647

        A run takes half a minute, so that it is no example here; docs/python.md shows one.
    """
    prepare()
    named = {name: value for name, value in (("strategy", strategy), ("dataset", dataset)) if _is_name(value)}
    if _is_name(model) and tokenizer is None:
        named["model"] = model
    given_metrics = _listed(metrics)
    if objective is not None:
        named["objective"] = _spec_of("objective", objective)
    if given_metrics:
        named["metric"] = [_spec_of("metrics", metric) for metric in given_metrics]
    given_sinks = _listed(sinks)
    if names := [sink for sink in given_sinks if _is_name(sink)]:
        named["sinks"] = names
    observers = [sink for sink in given_sinks if not _is_name(sink)]
    _check_sinks(observers)
    if _is_texts_by_client(dataset):
        settings = {"clients": max(1, len(dataset)), "partition": "natural", **settings}
    asked = _settled(config, {**settings, **named})

    objects = Objects(
        strategy=None if _is_name(strategy) else strategy,
        objective=None if _is_name(objective) else objective,
        metrics={_spec_of("metrics", metric): metric for metric in given_metrics if not _is_name(metric)},
    )
    if asked.engine != "local" and (objects.objective is not None or objects.metrics):
        setting = "objective" if objects.objective is not None else "metrics"
        given = objects.objective if setting == "objective" else next(iter(objects.metrics.values()))
        allowed = "a name, or an object with engine='local': no object crosses to the processes of the clients"
        raise SettingError(setting, kind_of(given), allowed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries, as the command has it
        return _run(asked, objects, None if _is_name(dataset) else dataset, _pair(model, tokenizer), observers)


def open(folder: str | os.PathLike[str]) -> Result:
    """Opens the folder of a run that came to its end.

    Raises:
        InputError: There is no such folder, it is not a run's, or the run did not end.

    Example:
        >>> import fedsplit
        >>> fedsplit.open("nowhere")
        Traceback (most recent call last):
        fedsplit.errors.InputError: nowhere is no folder of a run: there is no such folder
    """
    return Result(open_run(Path(folder)))


def _is_name(value: object) -> bool:
    return isinstance(value, str | os.PathLike)


def _is_texts_by_client(dataset: object) -> TypeGuard[Mapping[Any, Any]]:
    """Tells a plain dict from a `DatasetDict`, which is one, too."""
    return isinstance(dataset, Mapping) and not hasattr(dataset, "save_to_disk")


def _pair(model: object, tokenizer: object) -> object:
    """Returns a loaded model with its tokenizer as one object; None where the model is a name.

    Raises:
        SettingError: A tokenizer is given to a model that has its own.
    """
    if tokenizer is None:
        return None if _is_name(model) else model
    if model is None or _is_name(model) or isinstance(model, tuple):
        raise SettingError("tokenizer", f"one of {type(tokenizer).__name__}", "one together with a loaded model")
    return model, tokenizer


def _listed(values: object) -> list[Any]:
    """Returns some values as a list; a single name is a list of one."""
    if _is_name(values) or not isinstance(values, Iterable):
        return [values]
    return list(values)


def _check_sinks(sinks: Iterable[object]) -> None:
    """Makes sure that objects can receive events.

    Raises:
        SettingError: One cannot.
    """
    for sink in sinks:
        if isinstance(sink, type) or not (hasattr(sink, "handle") and hasattr(sink, "close")):
            allowed = "the name of a class, or an object with the methods handle and close"
            raise SettingError("sinks", kind_of(sink), allowed)


def _spec_of(name: str, value: Any) -> str:
    """Returns the name by which the settings know an objective or a metric.

    Args:
        name: Keyword that the value was given by.
        value: A name, or a function; a function's name ends with `(...)`, which a command refuses.

    Raises:
        SettingError: The value is neither.
    """
    if _is_name(value):
        return os.fspath(value)
    if isinstance(value, type) or not callable(value):
        raise SettingError(name, kind_of(value), "a name, or a function of logits and labels")
    maker = value if hasattr(value, "__qualname__") else type(value)
    return f"{maker.__module__}:{maker.__qualname__}{OBJECT}"


def _settled(config: Config | str | os.PathLike[str] | None, keywords: Mapping[str, Any]) -> Config:
    """Makes the configuration that keywords ask for, on top of a configuration or a file.

    Raises:
        InputError: A name is unknown, or a value is not allowed.
    """
    values, options = _by_dotted_name(keywords)
    if isinstance(config, Config):
        below, below_options = _set_in(config)
        merged = {setting: {**below_options[setting], **options[setting]} for setting in OPTIONS}
        return settle({**below, **values}, merged)
    if config is None or _is_name(config):
        return settle(values, options, None if config is None else Path(config))
    words = "a Config, or the path of a TOML file"
    raise SettingError("config", kind_of(config), words)


def _by_dotted_name(keywords: Mapping[str, Any]) -> tuple[dict[str, object], Options]:
    """Returns the settings among keywords by dotted name, and the options of strategy and objective.

    Raises:
        InputError: The options are no table.
    """
    options: Options = {}
    for setting, table in OPTIONS.items():
        given = keywords.get(table, {})
        if not isinstance(given, Mapping):
            raise SettingError(table, given, "a table")
        options[setting] = dict(given)

    nested: dict[str, Any] = {}
    for keyword, value in keywords.items():
        section, _, leaf = keyword.partition("__")
        if keyword in OPTIONS.values():
            continue
        if section in OPTIONS and leaf:
            options[section][leaf] = value
        elif leaf:
            nested[f"{section}.{leaf}"] = value
        elif section in SECTIONS and isinstance(value, SECTIONS[section]):
            nested |= {f"{section}.{name}": inner for name, inner in set_by_user(value).items()}
        else:
            nested[keyword] = dict(value) if isinstance(value, Mapping) else value
    values = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in nested.items()}
    return dotted(values), options


def _set_in(config: Config) -> tuple[dict[str, object], Options]:
    """Returns the settings of a configuration that do not have their defaults, and its options."""
    values = {}
    for name, (leaf, _) in LEAVES.items():
        section, _, field = name.rpartition(".")
        value = getattr(getattr(config, section) if section else config, field)
        if value != leaf.default:
            values[name] = value
    options = {setting: dict(getattr(config, table)) for setting, table in OPTIONS.items()}
    return values, options


def _run(config: Config, objects: Objects, dataset: object, model: object, sinks: Sequence[Any]) -> Result:
    """Runs what a configuration asks for, with objects in place of what it names."""
    from fedsplit import inputs
    from fedsplit.commands import simulate  # not before the environment is prepared

    if objects.strategy is not None:
        config = replace(config, **inputs.strategy_settings(objects.strategy))
    if config.resume:
        for name, given in (("dataset", dataset), ("model", model)):
            if given is not None:
                raise InputError(f"{name} cannot be set for a run that goes on: its folder has it already")
        simulate.run(config, objects=objects, sinks=sinks)
        return open(config.resume)
    folder = Path(config.out) if config.out else _free_folder()
    with inputs.written(folder, model, dataset) as found:
        config = replace(config, out=str(folder), **found)
        simulate.run(config, objects=objects, sinks=sinks)
    return open(folder)


def _free_folder() -> Path:
    """Returns a folder below `runs` that is named by the time, and is not there yet."""
    now = time.strftime("%Y-%m-%d_%H-%M-%S")
    names = itertools.chain([now], (f"{now}-{number}" for number in itertools.count(2)))
    return next(folder for folder in (Path("runs", name) for name in names) if not folder.exists())
