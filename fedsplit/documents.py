"""A configuration from plain values, as TOML and flags give them, and back."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsplit.allowed import FIELDS, PROMPTED, Allowed, InputError, SettingError
from fedsplit.config import LEAVES, OPTIONS, SECTIONS, Config, LoraSettings, words_of


def _convert(name: str, value: object, kind: Any) -> Any:
    """Turns a flag's text or a TOML value into the setting's type, and checks it."""
    allowed: Allowed = LEAVES[name][0].metadata["allowed"]
    try:
        if kind == tuple[str, ...]:
            converted: Any = tuple(value.split(",")) if isinstance(value, str) else tuple(value)  # type: ignore[arg-type]
            suits = all(isinstance(item, str) for item in converted)
        elif kind == tuple[int, ...]:
            converted = _whole_numbers(value)
            suits = True
        elif allowed is FIELDS:
            converted, suits = _object(value), True
        elif kind is bool:
            converted = {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value
            suits = isinstance(converted, bool)
        elif isinstance(value, bool) and kind is str and name == "data.packing":  # a switch that may also be planned
            converted, suits = str(value).lower(), True
        else:
            suits = not isinstance(value, bool) and (isinstance(value, str) or kind is not str)
            converted = kind(value)
            suits = suits and (kind is not int or isinstance(value, str) or value == converted)
        suits = suits and allowed.test(converted)
    except (TypeError, ValueError, OverflowError):
        suits = False
    if not suits:
        raise SettingError(name, _short(value), words_of(LEAVES[name][0], kind))
    return converted


def _whole_numbers(value: object) -> tuple[int, ...]:
    """Numbers from a list, from a text with commas, or from the file it names.

    Raises:
        ValueError, TypeError: It is none of these.
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
    """A JSON object as one line, from its text, from the file that the text names, or from a table; "" for none.

    Raises:
        ValueError, TypeError: It is none of these.
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
    """A value as a message shows it."""
    text = str(value) if not isinstance(value, int) or abs(value) < 10**20 else "a number of many digits"
    return "nothing" if text == "" else text if len(text) <= 200 else f"{text[:200]}…"


def build(
    values: Mapping[str, object],
    options: Mapping[str, Any] | None = None,
    objective_options: Mapping[str, Any] | None = None,
) -> Config:
    """Makes a configuration from dotted names.

    Virtual tokens and prefixes may be asked for as a kind of adapter, too, which is what they are to PEFT.

    Args:
        values: Settings by dotted name; those not named keep their defaults.
        options: Keyword arguments for the strategy.
        objective_options: Keyword arguments for the objective.

    Raises:
        InputError: A name is unknown, a value is not allowed, or two kinds of prompts are asked for.
    """
    top: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for name, value in values.items():
        if name not in LEAVES:
            raise InputError(f"there is no setting {name}; {suggest(name, LEAVES)}")
        section, _, leaf = name.rpartition(".")
        (parts[section] if section else top)[leaf] = _convert(name, value, LEAVES[name][1])
    keywords = {"strategy": dict(options or {}), "objective": dict(objective_options or {})}
    for setting, of_setting in keywords.items():
        for name, value in of_setting.items():
            if not isinstance(value, str | int | float):
                raise SettingError(f"{setting}.{name}", value, "a text, a number, true or false")
    _settle_peft(parts["lora"], parts["prompt"])
    sections = {name: cls(**parts[name]) for name, cls in SECTIONS.items()}
    tables: dict[str, Any] = {OPTIONS[setting]: of_setting for setting, of_setting in keywords.items()}
    return Config(**top, **sections, **tables)


def _settle_peft(lora: dict[str, Any], prompt: dict[str, Any]) -> None:
    """Where the kind of adapter is one of prompts, has `prompt.kind` say so, alone: that is what files keep.

    Raises:
        SettingError: `prompt.kind` says another one.
    """
    method, kind = lora.get("method"), prompt.get("kind", "off")
    if method not in PROMPTED:
        return
    if kind not in ("off", method):
        raise SettingError("prompt.kind", kind, f"{method} with --peft {method}")
    lora["method"], prompt["kind"] = LoraSettings.method, method


def suggest(name: str, known: Iterable[str]) -> str:
    """What somebody may have meant by a name that is not known."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return "did you mean " + " or ".join(close) + "?" if close else "see --help for the list"


def dotted(document: Mapping[str, Any]) -> dict[str, object]:
    """Nested values, as a file has them, by dotted name."""
    values: dict[str, object] = {}
    for key, value in document.items():
        if key in SECTIONS and isinstance(value, dict):
            values |= {f"{key}.{leaf}": inner for leaf, inner in value.items()}
        else:
            values[key] = value
    return values


def set_by_user(section: Any) -> dict[str, Any]:
    """The settings of a section, by the names of its fields, that do not have their defaults."""
    values = {leaf.name: (getattr(section, leaf.name), leaf.default) for leaf in dataclasses.fields(section)}
    return {name: value for name, (value, default) in values.items() if value != default}


def as_document(config: Config) -> dict[str, Any]:
    """The configuration as nested plain values, ready to be written as TOML.

    The run's folder is left out: who runs the file again gets a folder of its own.
    """
    document = dataclasses.asdict(config)
    del document["out"], document["resume"]
    document["share"] = list(config.share)
    document["metric"] = list(config.metric)
    document["lora"]["targets"] = list(config.lora.targets)
    document["lora"]["rank"] = list(config.lora.rank) if len(config.lora.rank) > 1 else config.lora.rank[0]
    return document


def from_document(document: Mapping[str, Any]) -> Config:
    """The inverse of `as_document`."""
    settings = {key: value for key, value in document.items() if key not in OPTIONS.values()}
    options, objective_options = (document.get(table) for table in OPTIONS.values())
    return build(dotted(settings), options, objective_options)
