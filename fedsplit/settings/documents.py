"""Converts plain values, as TOML files and flags have them, into a configuration, and back."""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os.path import isfile
from pathlib import Path
from typing import Any

from fedsplit.errors import ErrorCollector, InputError, SettingError, UnknownValue, check_all, shortened
from fedsplit.settings.chains import parts_of
from fedsplit.settings.choices import NETWORKS, PROMPTED
from fedsplit.settings.config import OPTIONS, SECTIONS, SETTINGS, SEVERAL, Config
from fedsplit.settings.drafts import Draft, without
from fedsplit.settings.fields import Setting
from fedsplit.settings.sections import LoraSettings, Section
from fedsplit.settings.validators import ADAPTER_CODEC, CODEC, COMPUTE_TABLE, FIELDS, NETWORK, ROLE_CODEC, TABLES

BY_ALIAS = {setting.alias.removeprefix("--"): name for name, setting in SETTINGS.items() if setting.alias}
"""Settings by their second flags, such as `train.lr` by `lr`."""


def _convert(setting: Setting, value: object) -> Any:
    """Converts a flag's text or a TOML value to the type of a setting, and checks the value.

    Args:
        setting: The setting.
        value: The text or the TOML value.

    Raises:
        SettingError: The value has another type, or is not allowed.
    """
    try:
        converted = _typed(setting, value)
        is_allowed = setting.allowed.test(converted)
    except (TypeError, ValueError, OverflowError):
        is_allowed = False
    if not is_allowed:
        raise SettingError(setting.name, shortened(value), setting.allowed_for(value))
    return converted


def _typed(setting: Setting, value: Any) -> Any:
    """Converts a value to the type of a setting.

    Raises:
        TypeError, ValueError, OverflowError: The value has another type, or is not exactly a value of the type.
    """
    if setting.item_type is str:
        items = tuple(value.split(",") if isinstance(value, str) else value)
        if not all(isinstance(item, str) for item in items):
            raise TypeError
        return items
    if setting.item_type is int:
        return _whole_numbers(value)
    if setting.allowed is FIELDS:
        return _object(setting.name, value)
    if setting.allowed in (CODEC, ROLE_CODEC, ADAPTER_CODEC) and isinstance(value, str):
        return ",".join(parts_of(value))  # so that spaces are no difference between two runs
    if setting.allowed in (NETWORK, TABLES):
        return _tables(setting, value)
    if setting.python_type is bool:
        return _switch(value)
    if setting.name == "data.packing" and isinstance(value, bool):  # a text: true, false or auto
        return str(value).lower()

    # TOML has types: true is no number, and a number is no text. Python would convert both without a word.
    if isinstance(value, bool) or (setting.python_type is str and not isinstance(value, str)):
        raise TypeError
    converted = setting.python_type(value)
    is_rounded = setting.python_type is int and not isinstance(value, str) and value != converted  # such as 2.5
    if is_rounded:
        raise ValueError
    return converted


def _switch(value: object) -> bool:
    """Reads true or false from a TOML value, or from a flag's text.

    Raises:
        TypeError: The value is neither.
    """
    switch = {"true": True, "false": False}.get(value) if isinstance(value, str) else value
    if not isinstance(switch, bool):
        raise TypeError
    return switch


def _whole_numbers(value: object) -> tuple[int, ...]:
    """Reads whole numbers from a list, from a text with commas, or from a file that the text names.

    Raises:
        ValueError, TypeError: The value is none of these.
    """
    items: Sequence[Any]
    if isinstance(value, list | tuple):
        items = value
    elif not isinstance(value, str):
        items = [value]
    elif re.fullmatch(r"[\d,\s+-]*", value):  # with signs: -4 is a wrong number, not the name of a file
        items = value.split(",")
    else:  # no text of numbers: the name of a file
        try:
            text = Path(value).read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError from error
        # A file may have commas, lines, or both.
        items = text.replace(",", " ").split()
    for item in items:
        is_whole = isinstance(item, int | str) and not isinstance(item, bool)  # True is an int in Python
        if not is_whole:
            raise TypeError
    return tuple(int(item) for item in items)


def _object(setting: str, value: object) -> str:
    """Reads a JSON object from a text, from a file that the text names, or from a TOML table.

    Args:
        setting: Name of the setting, for messages.
        value: The text or the table.

    Returns:
        The object as one line of JSON; "" if it is empty.

    Raises:
        SettingError: The value has a date or a time.
        ValueError, TypeError: The value is none of these.
    """
    if isinstance(value, str):
        text = value.strip()
        if text and not text.startswith("{"):
            try:
                text = Path(text).read_text(encoding="utf-8")
            except OSError as error:
                raise ValueError from error
        value = json.loads(text or "{}")
    if not isinstance(value, Mapping):
        raise TypeError
    _check_times(setting, value)
    # Sorted, so that the order of the fields is no difference between two runs.
    # NaN, which JSON does not have, is refused.
    return json.dumps(value, sort_keys=True, allow_nan=False) if value else ""


def _tables(setting: Setting, value: object) -> str:
    """Reads TOML tables from a file that a text names. The name of a network stays as it is.

    Args:
        setting: The setting.
        value: Name of a file or of a network, the tables as JSON, or the tables themselves.

    Returns:
        The tables as one line of JSON, or the name.

    Raises:
        SettingError: The file cannot be read, is no TOML, is no file of compute times where the setting takes one, or
            has a date or a time, which no setting takes.
        ValueError, TypeError: The value is none of these.
    """
    if isinstance(value, str) and (value in ("", *NETWORKS) or value.startswith("{")):
        return value
    if isinstance(value, str):
        file = Path(value)
        if not isfile(file):  # `Path.is_file` would raise an error for a name that is too long
            raise ValueError
        try:
            value = tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise SettingError(setting.name, shortened(file), f"a file that can be read ({error.strerror})") from None
        except (ValueError, RecursionError) as error:
            raise SettingError(setting.name, shortened(file), f"a TOML file ({error})") from None
        # Checked here, where the name of the file is known.
        if setting.allowed is TABLES and COMPUTE_TABLE not in value:
            raise SettingError(setting.name, shortened(file), setting.words)
    if not isinstance(value, Mapping):
        raise TypeError
    _check_times(setting.name, value)
    return json.dumps(value, sort_keys=True)  # numbers that are not finite are refused where they are used


def _check_times(setting: str, value: object) -> None:
    """Checks that a TOML value has no date and no time, and names the field of the first one.

    Raises:
        SettingError: The value has a date or a time.

    Example:
        >>> _check_times("network.profile", tomllib.loads("default.rtt_ms = 2020-01-01"))
        Traceback (most recent call last):
        fedsplit.errors.SettingError: network.profile.default.rtt_ms: 2020-01-01 is not possible; allowed: a value \
that is no date and no time
    """
    if isinstance(value, Mapping):
        for name, item in value.items():
            _check_times(f"{setting}.{name}", item)
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value, start=1):
            _check_times(f"{setting}, item {place}", item)
    elif isinstance(value, datetime.date | datetime.time):
        raise SettingError(setting, value, "a value that is no date and no time")


def build(
    values: Mapping[str, object],
    options: Mapping[str, Any] | None = None,
    objective_options: Mapping[str, Any] | None = None,
    metric_options: Mapping[str, Any] | None = None,
    sink_options: Mapping[str, Any] | None = None,
    mod_options: Mapping[str, Any] | None = None,
) -> Config:
    """Builds a configuration from settings by dotted name.

    `lora.method` may also name a kind of virtual tokens or prefixes, since PEFT treats these as adapters.

    Args:
        values: Settings by dotted name. Settings that are not named keep their defaults.
        options: Keyword arguments for the strategy.
        objective_options: Keyword arguments for the objective.
        metric_options: Keyword arguments for metrics, by NAME.KEY or as a table by name.
        sink_options: Keyword arguments for sinks, by NAME.KEY or as a table by name.
        mod_options: Keyword arguments for mods, by NAME.KEY or as a table by name.

    Raises:
        InputError: A name is unknown, a value is not allowed, or two kinds of prompts are asked for. All errors are
            reported together.

    Example:
        >>> build({"clients": 4, "lora.rank": "4,8"}).lora.rank
        (4, 8)
    """
    tables = (options, objective_options, metric_options, sink_options, mod_options)
    return draft(values, dict(zip(OPTIONS, tables, strict=True))).checked()


def draft(values: Mapping[str, object], tables: Mapping[str, Any]) -> Draft:
    """Builds a draft of a configuration from settings by dotted name, as `build` does, without raising the errors.

    Args:
        values: Settings by dotted name. Settings that are not named keep their defaults.
        tables: Keyword arguments by the setting that names their class, as in `OPTIONS`.

    Example:
        >>> errors = draft({"clients": "x", "rounds": 3}, {}).errors
        >>> [error.setting for error in errors]
        ['clients']
    """
    collector = ErrorCollector()
    wrong: set[str] = set()
    fields: dict[str, dict[str, Any]] = {section: {} for section in ("", *SECTIONS)}
    for name, value in values.items():
        if name not in SETTINGS:
            hint = f"did you mean {BY_ALIAS[name]}?" if name in BY_ALIAS else suggest(name, SETTINGS)
            collector.extend([InputError(f"there is no setting {shortened(name)}; {hint}")])
            # A misspelt setting may be any similar one. Their defaults are not what the user asked for.
            wrong |= meant_by(name) - values.keys()
            continue
        setting = SETTINGS[name]
        try:
            fields[setting.section][setting.field] = _convert(setting, value)
        except SettingError as error:
            collector.extend(error.errors)
            wrong.add(name)

    options: dict[str, dict[str, Any]] = {}
    for name, field in OPTIONS.items():
        try:
            options[field] = _options(name, tables.get(name))
        except InputError as error:
            collector.extend(error.errors)
            wrong.add(field)

    try:
        _settle_peft(fields["lora"], fields["prompt"])
    except SettingError as error:
        collector.extend(error.errors)
        # Either of the two may be the one that the user wants.
        wrong |= {"lora.method", "prompt.kind"}

    sections: dict[str, Any] = {name: cls(**fields[name]) for name, cls in SECTIONS.items()}
    tables_of_config: dict[str, Any] = options
    # Wrong settings have their defaults at first, and lose them in the draft.
    config = Config(**fields[""], **sections, **tables_of_config)
    is_default = not any(fields.values()) and not any(options.values())
    return Draft(without(config, wrong), collector.errors, is_default)


def meant_by(name: str) -> set[str]:
    """Returns the settings that a user may have meant by an unknown name.

    Example:
        >>> "lora.rank" in meant_by("lora.rang")
        True
    """
    if name in BY_ALIAS:
        return {BY_ALIAS[name]}
    # The name of a section may stand for each of its settings.
    of_section = {setting for setting in SETTINGS if setting.startswith(f"{name}.")}
    return of_section or {*similar(name, SETTINGS)}


def _options(setting: str, table: object) -> dict[str, Any]:
    """Returns the keyword arguments that belong to a setting; none if `table` is None.

    Raises:
        InputError: They are no table, or an argument is wrong. All errors are reported together.
    """
    if table is None:
        return {}
    if not isinstance(table, Mapping):
        raise SettingError(OPTIONS[setting], shortened(table), "a table")
    keywords = by_key(table) if setting in SEVERAL else dict(table)
    check_all(_wrong_options(setting, keywords))
    return keywords


def _wrong_options(setting: str, options: Mapping[str, Any]) -> Iterator[InputError]:
    """Yields an error for each keyword argument that cannot be written as TOML, or does not name its class.

    Args:
        setting: Name of the setting that the arguments belong to.
        options: The keyword arguments.
    """
    for name, value in options.items():
        if setting in SEVERAL and "." not in name:
            allowed = f"an option with a name before it, as in {setting}.NAME.{name}"
            yield SettingError(f"{setting}.{name}", value, allowed)
        elif not isinstance(value, str | int | float):
            yield SettingError(f"{setting}.{name}", value, "a text, a number, true or false")


def by_key(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of several classes by NAME.KEY, of which some may be given as a table by name.

    Example:
        >>> by_key({"rouge": {"stem": True}, "bleu.order": 4})
        {'rouge.stem': True, 'bleu.order': 4}
    """
    flat: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    return flat


def _settle_peft(lora: dict[str, Any], prompt: dict[str, Any]) -> None:
    """Moves a kind of prompts from `lora.method` to `prompt.kind`, since `config.toml` has kinds of prompts there.

    Args:
        lora: Values of the section `lora`; changed in place.
        prompt: Values of the section `prompt`; changed in place.

    Raises:
        SettingError: `prompt.kind` names another kind.
    """
    method = lora.get("method")
    if method not in PROMPTED:
        return
    kind = prompt.get("kind", "off")
    if kind not in ("off", method):
        raise SettingError("prompt.kind", kind, f"{method} with --peft {method}")
    lora["method"] = LoraSettings.method
    prompt["kind"] = method


def suggest(name: str, known: Iterable[str]) -> str:
    """Suggests known names that are similar to an unknown one.

    Example:
        >>> suggest("client", ["clients", "rounds"])
        'did you mean clients?'
    """
    close = similar(name, known)
    if not close:
        return "see --help for the list"
    return f"did you mean {' or '.join(close)}?"


def similar(name: str, known: Iterable[str]) -> list[str]:
    """Returns the known names that are most similar to an unknown one.

    Example:
        >>> similar("client", ["clients", "rounds"])
        ['clients']
    """
    return difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)


def dotted(document: Mapping[str, Any]) -> dict[str, object]:
    """Flattens nested values, as in a TOML file, to values by dotted name.

    Example:
        >>> dotted({"clients": 4, "lora": {"rank": 8}})
        {'clients': 4, 'lora.rank': 8}
    """
    values: dict[str, object] = {}
    for key, value in document.items():
        if key in SECTIONS and isinstance(value, dict):
            values |= {f"{key}.{field}": inner for field, inner in value.items()}
        else:
            values[key] = value
    return values


def set_by_user(section: Section) -> dict[str, Any]:
    """Returns the settings of a section that differ from their defaults, by the names of the section's fields.

    In a draft, wrong settings are left out.

    Example:
        >>> set_by_user(LoraSettings(alpha=8.0))
        {'alpha': 8.0}
    """
    changed = {}
    for field in dataclasses.fields(section):
        try:
            value = getattr(section, field.name)
        except UnknownValue:
            continue
        if value != field.default:
            changed[field.name] = value
    return changed


def as_document(config: Config) -> dict[str, Any]:
    """Returns a configuration as nested plain values, which can be written as TOML.

    The run's folder is left out, so that a second run from the file gets a folder of its own.
    """
    document = dataclasses.asdict(config)
    del document["out"], document["resume"]
    for setting in SETTINGS.values():
        table = document[setting.section] if setting.section else document
        if setting.item_type is not None:
            # As TOML reads them back, which has no tuples.
            table[setting.field] = list(table[setting.field])
    if len(config.lora.rank) == 1:
        # A single rank is a number in the file, as a user writes one.
        document["lora"]["rank"] = config.lora.rank[0]
    return document


def from_document(document: Mapping[str, Any]) -> Config:
    """Builds a configuration from nested values that `as_document` returned.

    Example:
        >>> from_document(as_document(Config(clients=4))).clients
        4
    """
    settings = {key: value for key, value in document.items() if key not in OPTIONS.values()}
    tables = {setting: document.get(table) for setting, table in OPTIONS.items()}
    return draft(dotted(settings), tables).checked()
