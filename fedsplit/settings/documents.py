"""Converts plain values, as from TOML and flags, into a configuration, and a configuration into plain values."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsplit.errors import InputError, SettingError
from fedsplit.settings.choices import PROMPTED
from fedsplit.settings.config import LEAVES, OPTIONS, SECTIONS, Config
from fedsplit.settings.fields import words_of
from fedsplit.settings.sections import LoraSettings
from fedsplit.settings.validators import FIELDS, Validator


def _convert(name: str, value: object, kind: Any) -> Any:
    """Converts a flag's text or a TOML value to the type of a setting, and checks the value.

    Args:
        name: Dotted name of the setting.
        value: The text or the TOML value.
        kind: Type of the setting.

    Raises:
        SettingError: The value has another type, or is not allowed.
    """
    leaf = LEAVES[name][0]
    allowed: Validator = leaf.metadata["allowed"]
    try:
        converted = _typed(name, value, kind)
        suits = allowed.test(converted)
    except (TypeError, ValueError, OverflowError):
        suits = False
    if not suits:
        raise SettingError(name, _short(value), words_of(leaf, kind))
    return converted


def _typed(name: str, value: Any, kind: Any) -> Any:
    """Converts a value to the type of a setting.

    Raises:
        TypeError, ValueError, OverflowError: The value has another type, or is not exactly a value of the type.
    """
    if kind == tuple[str, ...]:
        items = tuple(value.split(",") if isinstance(value, str) else value)
        if not all(isinstance(item, str) for item in items):
            raise TypeError
        return items
    if kind == tuple[int, ...]:
        return _whole_numbers(value)
    if LEAVES[name][0].metadata["allowed"] is FIELDS:
        return _object(value)
    if kind is bool:
        return _switch(value)
    if name == "data.packing" and isinstance(value, bool):  # a text: true, false or auto
        return str(value).lower()

    # TOML has types of its own: true is no number, and a number is no text.
    if isinstance(value, bool) or (kind is str and not isinstance(value, str)):
        raise TypeError
    converted = kind(value)
    if kind is int and not isinstance(value, str) and value != converted:  # such as 2.5
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
    if isinstance(value, str) and not re.fullmatch(r"[\d,\s+-]*", value):
        try:
            value = ",".join(Path(value).read_text(encoding="utf-8").replace(",", " ").split())
        except OSError as error:
            raise ValueError from error
    items: Sequence[Any] = value.split(",") if isinstance(value, str) else [value]
    if isinstance(value, list | tuple):
        items = value
    if any(isinstance(item, bool) or not isinstance(item, int | str) for item in items):
        raise TypeError
    return tuple(int(item) for item in items)


def _object(value: object) -> str:
    """Reads a JSON object from its text, from a file that the text names, or from a TOML table.

    Returns:
        The object as one line of JSON; "" if it is empty.

    Raises:
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
    return json.dumps(value, sort_keys=True, allow_nan=False) if value else ""


def _short(value: object) -> str:
    """Returns a value as error messages show it."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a number of many digits"
    text = str(value)
    if text == "":
        return "nothing"
    return text if len(text) <= 200 else f"{text[:200]}…"


def build(
    values: Mapping[str, object],
    options: Mapping[str, Any] | None = None,
    objective_options: Mapping[str, Any] | None = None,
) -> Config:
    """Builds a configuration from settings by dotted name.

    `lora.method` may also name a kind of virtual tokens or prefixes, since PEFT treats these as adapters.

    Args:
        values: Settings by dotted name. Settings that are not named keep their defaults.
        options: Keyword arguments for the strategy.
        objective_options: Keyword arguments for the objective.

    Raises:
        InputError: A name is unknown, a value is not allowed, or two kinds of prompts are asked for.

    Example:
        >>> build({"clients": 4, "lora.rank": "4,8"}).lora.rank
        (4, 8)
    """
    top: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for name, value in values.items():
        if name not in LEAVES:
            raise InputError(f"there is no setting {name}; {suggest(name, LEAVES)}")
        section, _, leaf = name.rpartition(".")
        target = sections[section] if section else top
        target[leaf] = _convert(name, value, LEAVES[name][1])

    keywords = {"strategy": dict(options or {}), "objective": dict(objective_options or {})}
    for setting, of_setting in keywords.items():
        for name, value in of_setting.items():
            if not isinstance(value, str | int | float):
                raise SettingError(f"{setting}.{name}", value, "a text, a number, true or false")

    _settle_peft(sections["lora"], sections["prompt"])
    settings = {name: cls(**sections[name]) for name, cls in SECTIONS.items()}
    tables: dict[str, Any] = {OPTIONS[setting]: of_setting for setting, of_setting in keywords.items()}
    return Config(**top, **settings, **tables)


def _settle_peft(lora: dict[str, Any], prompt: dict[str, Any]) -> None:
    """Moves a kind of prompts from `lora.method` to `prompt.kind`, the form in which files keep it.

    Raises:
        SettingError: `prompt.kind` names another kind.
    """
    method = lora.get("method")
    kind = prompt.get("kind", "off")
    if method not in PROMPTED:
        return
    if kind not in ("off", method):
        raise SettingError("prompt.kind", kind, f"{method} with --peft {method}")
    lora["method"], prompt["kind"] = LoraSettings.method, method


def suggest(name: str, known: Iterable[str]) -> str:
    """Suggests known names that are similar to an unknown one.

    Example:
        >>> suggest("client", ["clients", "rounds"])
        'did you mean clients?'
    """
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return "did you mean " + " or ".join(close) + "?" if close else "see --help for the list"


def dotted(document: Mapping[str, Any]) -> dict[str, object]:
    """Flattens nested values, as a TOML file has them, to values by dotted name.

    Example:
        >>> dotted({"clients": 4, "lora": {"rank": 8}})
        {'clients': 4, 'lora.rank': 8}
    """
    values: dict[str, object] = {}
    for key, value in document.items():
        if key in SECTIONS and isinstance(value, dict):
            values |= {f"{key}.{leaf}": inner for leaf, inner in value.items()}
        else:
            values[key] = value
    return values


def set_by_user(section: Any) -> dict[str, Any]:
    """Returns the settings of a section that differ from their defaults, by the names of the section's fields."""
    values = {leaf.name: (getattr(section, leaf.name), leaf.default) for leaf in dataclasses.fields(section)}
    return {name: value for name, (value, default) in values.items() if value != default}


def as_document(config: Config) -> dict[str, Any]:
    """Returns the configuration as nested plain values, which can be written as TOML.

    The run's folder is left out, so that another run from the file gets its own folder.
    """
    document = dataclasses.asdict(config)
    del document["out"], document["resume"]
    document["share"] = list(config.share)
    document["sinks"] = list(config.sinks)
    document["metric"] = list(config.metric)
    document["lora"]["targets"] = list(config.lora.targets)
    ranks = list(config.lora.rank)
    document["lora"]["rank"] = ranks if len(ranks) > 1 else ranks[0]
    return document


def from_document(document: Mapping[str, Any]) -> Config:
    """Builds a configuration from nested values that `as_document` returned.

    Example:
        >>> from_document(as_document(Config(clients=4))).clients
        4
    """
    settings = {key: value for key, value in document.items() if key not in OPTIONS.values()}
    options, objective_options = (document.get(table) for table in OPTIONS.values())
    return build(dotted(settings), options, objective_options)
