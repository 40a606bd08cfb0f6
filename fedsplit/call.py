"""A call of `fedsplit.run`: divides the arguments into settings and objects, and collects their errors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from fedsplit.errors import ErrorCollector, SettingError, kind_of
from fedsplit.loading import OBJECT
from fedsplit.objects import NOTHING, Objects
from fedsplit.settings.command_line import Options
from fedsplit.settings.config import OPTIONS, SECTIONS, SETTINGS, SEVERAL, Config
from fedsplit.settings.documents import by_key, dotted, set_by_user
from fedsplit.settings.drafts import Draft, without
from fedsplit.settings.flags import FIELDS, settle_draft


@dataclass(frozen=True)
class Arguments:
    """The arguments of `run` that may be names or objects; see `run`."""

    strategy: object
    dataset: object
    model: object
    tokenizer: object
    objective: object
    metrics: Sequence[object]
    sinks: Sequence[object]


@dataclass(frozen=True)
class Call:
    """A call of `run`, divided into settings and objects.

    Attributes:
        draft: The settings, with the errors of all arguments.
        objects: Strategy, objective and metrics that are objects.
        model: Model that is an object; None if the settings name a model.
        dataset: Data set that is an object; None if the settings name a data set.
        sinks: Sinks that are objects.
    """

    draft: Draft
    objects: Objects
    model: object
    dataset: object
    sinks: Sequence[Any]


def read_call(
    config: Config | str | os.PathLike[str] | None,
    arguments: Arguments,
    settings: Mapping[str, object],
) -> Call:
    """Divides the arguments of `run` into settings and objects. Errors are collected in the draft.

    Args:
        config: Settings to begin with.
        arguments: Arguments that may be names or objects.
        settings: All further keywords.

    Example:
        >>> arguments = Arguments("fedprox", {"ann": ["a text"]}, None, None, None, metrics=[], sinks=[])
        >>> call = read_call(None, arguments, {"rounds": 3})
        >>> config = call.draft.config
        >>> config.strategy, config.rounds, config.clients, config.partition
        ('fedprox', 3, 1, 'natural')
        >>> call.dataset
        {'ann': ['a text']}
    """
    sink_objects = [sink for sink in arguments.sinks if not _is_name(sink)]

    # Every error is collected, so that the user reads all of them at once.
    collector = ErrorCollector()
    with collector.collecting():
        _check_sinks(sink_objects)
    named, unnamed = _named_settings(arguments, collector)
    dataset = arguments.dataset
    if _is_texts_by_client(dataset):
        # The user's own settings win. An empty dict is refused as a data set, and not for its number of clients.
        settings = {"clients": max(1, len(dataset)), "partition": "natural", **settings}
    draft = _draft(config, {**settings, **named})
    collector.extend(draft.errors)

    objective = arguments.objective
    objects = Objects(
        strategy=None if _is_name(arguments.strategy) else arguments.strategy,
        objective=objective if _is_function(objective) else None,
        metrics={_spec_of("metrics", metric): metric for metric in arguments.metrics if _is_function(metric)},
    )
    with collector.collecting():
        _check_objects_can_reach_clients(objects, draft.config.engine)
    model_object = None if _is_name(arguments.model) else arguments.model
    with collector.collecting():
        model_object = _model_object(arguments.model, arguments.tokenizer)
    dataset_object = None if _is_name(dataset) else dataset

    has_objects = objects != NOTHING or model_object is not None or dataset_object is not None
    is_default = draft.is_default and not has_objects
    full_config = without(draft.config, unnamed) if unnamed else draft.config
    draft = Draft(full_config, collector.errors, is_default)
    return Call(draft, objects, model_object, dataset_object, sink_objects)


def _named_settings(arguments: Arguments, collector: ErrorCollector) -> tuple[dict[str, object], set[str]]:
    """Returns the settings that stand for arguments of `run`.

    Names stand for themselves. An objective or a metric that is a function gets a name (see `_spec_of`). Any other
    object has no setting.

    Args:
        arguments: The arguments.
        collector: Collects the errors of objectives and metrics that have no name.

    Returns:
        The settings by name, and the names of the settings that could not be set.
    """
    named: dict[str, object] = {}
    unnamed = {"objective", "objective_options", "metric", "metric_options"}
    if _is_name(arguments.strategy):
        named["strategy"] = arguments.strategy
    if _is_name(arguments.dataset):
        named["dataset"] = arguments.dataset
    if _is_name(arguments.model) and arguments.tokenizer is None:
        named["model"] = arguments.model
    with collector.collecting():
        if arguments.objective is not None:
            named["objective"] = _spec_of("objective", arguments.objective)
        unnamed -= {"objective", "objective_options"}  # not reached after an error
    with collector.collecting():
        if arguments.metrics:
            named["metric"] = [_spec_of("metrics", metric) for metric in arguments.metrics]
        unnamed -= {"metric", "metric_options"}
    sink_names = [sink for sink in arguments.sinks if _is_name(sink)]
    if sink_names:
        named["sinks"] = sink_names
    return named, unnamed


def _draft(config: Config | str | os.PathLike[str] | None, keywords: Mapping[str, Any]) -> Draft:
    """Makes a draft of a configuration from keywords, on top of a configuration or a file."""
    collector = ErrorCollector()
    hidden: set[str] = set()
    for table in OPTIONS.values():
        if not isinstance(keywords.get(table, {}), Mapping):
            collector.extend([SettingError(table, keywords[table], "a table")])
            hidden.add(table)
    visible = {name: value for name, value in keywords.items() if name not in hidden}
    values, options = _by_dotted_name(visible)

    file = None
    if isinstance(config, Config):
        base_values, base_options = _set_in(config)
        values = {**base_values, **values}
        options = {setting: {**base_options[setting], **options[setting]} for setting in OPTIONS}
    elif _is_name(config):
        file = Path(config)
    elif config is not None:
        collector.extend([SettingError("config", kind_of(config), "a Config, or the path of a TOML file")])
        hidden |= FIELDS - values.keys()  # it may have set every setting that no keyword sets
    draft = settle_draft(values, options, file)
    collector.extend(draft.errors)
    return Draft(without(draft.config, hidden), collector.errors, draft.is_default)


def _by_dotted_name(keywords: Mapping[str, Any]) -> tuple[dict[str, object], Options]:
    """Returns the settings among keywords by dotted name, and the options of the classes that they name."""
    options: Options = {}
    for setting, table in OPTIONS.items():
        given = keywords.get(table, {})
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
    for name, value in values.items():
        if isinstance(value, os.PathLike):
            values[name] = os.fspath(value)
    return dotted(values), options


def _set_in(config: Config) -> tuple[dict[str, object], Options]:
    """Returns the settings of a configuration that differ from their defaults, and the options."""
    values = {}
    for name, setting in SETTINGS.items():
        value = config.value_of(setting)
        if value != setting.default:
            values[name] = value
    options = {setting: dict(getattr(config, table)) for setting, table in OPTIONS.items()}
    return values, options


def _check_objects_can_reach_clients(objects: Objects, engine: str) -> None:
    """Makes sure that the clients can call the objective and the metrics.

    Raises:
        SettingError: One of these is an object, and the clients live in processes of their own.
    """
    if engine == "local":
        return
    allowed = "a name, or an object with engine='local': no object crosses to the processes of the clients"
    if objects.objective is not None:
        raise SettingError("objective", kind_of(objects.objective), allowed)
    for metric in objects.metrics.values():
        raise SettingError("metrics", kind_of(metric), allowed)


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
    if not _is_function(value):
        raise SettingError(name, kind_of(value), "a name, or a function of logits and labels")
    # An object with `__call__` has no name; its class has.
    qualified_name = getattr(value, "__qualname__", type(value).__qualname__)
    module = value.__module__
    return f"{module}:{qualified_name}{OBJECT}"


def listed(values: object) -> list[Any]:
    """Returns the values of an iterable as a list. A single value, such as a name, becomes a list of one.

    Example:
        >>> listed("rouge"), listed(("rouge", "bleu"))
        (['rouge'], ['rouge', 'bleu'])
    """
    if _is_name(values) or not isinstance(values, Iterable):
        return [values]
    return list(values)


def _is_name(value: object) -> TypeGuard[str | os.PathLike[str]]:
    return isinstance(value, str | os.PathLike)


def _is_function(value: object) -> TypeGuard[Callable[..., Any]]:
    return callable(value) and not isinstance(value, type)


def _is_texts_by_client(dataset: object) -> TypeGuard[Mapping[Any, Any]]:
    """Returns True for texts by client. A `DatasetDict` is a mapping, too, but of splits."""
    return isinstance(dataset, Mapping) and not hasattr(dataset, "save_to_disk")
