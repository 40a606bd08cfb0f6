"""Reads a study file from TOML, together with the file that it extends."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsplit.errors import ErrorCollector, InputError, SettingError, shortened
from fedsplit.settings.config import OPTIONS, SECTIONS, SETTINGS, SEVERAL
from fedsplit.settings.documents import by_key, dotted, suggest

EXTENDS = "extends"
"""Key that names the file that a study file extends."""

TABLES = ("settings", "grid")
"""Tables that are merged with those of the extended file, setting by setting."""

VARIANTS = "variants"
"""List that follows the list of the extended file."""

KEYS = (EXTENDS, "seeds", "baseline", *TABLES, VARIANTS)
"""Keys of a study file."""


@dataclass(frozen=True)
class StudyFile:
    """A study file and the file that it extends.

    Attributes:
        document: Content of both files, merged.
        texts: Text of each file by its name, for copies.
    """

    document: Mapping[str, Any] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)


def flat(table: Mapping[str, Any]) -> dict[str, Any]:
    """Flattens a table of settings to values by dotted name. Options get the name of their table before their own.

    Example:
        >>> flat({"rounds": 3, "lora": {"rank": 4}, "strategy_options": {"mu": 0.1}})
        {'rounds': 3, 'lora.rank': 4, 'strategy_options.mu': 0.1}
    """
    values = dotted(table)
    for setting, name in OPTIONS.items():
        options = values.get(name)
        if isinstance(options, Mapping):
            del values[name]
            options = by_key(options) if setting in SEVERAL else options
            values |= {f"{name}.{key}": value for key, value in options.items()}
    return values


def read_file(path: Path, collector: ErrorCollector) -> StudyFile:
    r"""Reads a study file and the file that it extends.

    Args:
        path: The study file.
        collector: Collects unknown keys of both files.

    Raises:
        InputError: A file cannot be read, is not TOML, or cannot be extended.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "base.toml").write_text("seeds = [0]\n[settings]\nrounds = 3\nclients = 4")
        >>> _ = (folder / "study.toml").write_text('extends = "base.toml"\n[settings]\nrounds = 5')
        >>> read_file(folder / "study.toml", ErrorCollector()).document
        {'seeds': [0], 'settings': {'rounds': 5, 'clients': 4}}
    """
    text = _text(path)
    document = _parsed(path, text, collector)
    if EXTENDS not in document:
        return StudyFile(document, {path.name: text})
    base_path = path.parent / _name_of_base(document.pop(EXTENDS))
    base_text = _text(base_path)
    base = _parsed(base_path, base_text, collector)
    if EXTENDS in base:
        raise InputError(f"{path} extends {base_path}, which extends another file; allowed: one file that extends none")
    return StudyFile(extended(base, document), {path.name: text, base_path.name: base_text})


def extended(
    base: Mapping[str, Any],
    document: Mapping[str, Any],
) -> dict[str, Any]:
    """Merges a study with the study that it extends. Values of a wrong type stay, to be refused by name.

    Args:
        base: Content of the extended file.
        document: Content of the extending file, whose values replace those of the extended file.

    Example:
        >>> base = {"seeds": [0], "grid": {"clients": [2, 4]}, "variants": [{"name": "a"}]}
        >>> extended(base, {"seeds": [1], "variants": [{"name": "b"}]})
        {'seeds': [1], 'grid': {'clients': [2, 4]}, 'variants': [{'name': 'a'}, {'name': 'b'}]}
    """
    merged = {**base, **document}
    for key in base.keys() & document.keys():
        lower, upper = base[key], document[key]
        if key in TABLES:
            wrong = [each for each in (lower, upper) if not isinstance(each, Mapping)]
            merged[key] = wrong[0] if wrong else {**flat(lower), **flat(upper)}
        elif key == VARIANTS:
            wrong = [each for each in (lower, upper) if not isinstance(each, list)]
            merged[key] = wrong[0] if wrong else [*lower, *upper]
    return merged


def _text(path: Path) -> str:
    """Returns the text of a file.

    Raises:
        InputError: The file cannot be read, or is no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{path} is not TOML ({error})") from None


def _parsed(path: Path, text: str, collector: ErrorCollector) -> dict[str, Any]:
    """Returns the content of a file. Unknown keys are collected.

    Raises:
        InputError: The text is not TOML.
    """
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not TOML ({error})") from None
    for key in document:
        if key not in KEYS:
            is_setting = key in (*SETTINGS, *SECTIONS, *OPTIONS.values())
            hint = "settings belong in the table [settings]" if is_setting else suggest(key, KEYS)
            collector.extend([InputError(f"{path}: there is no key {key}; {hint}")])
    return document


def _name_of_base(given: object) -> str:
    """Returns the name of the extended file.

    Raises:
        SettingError: The value is no name of a file in the same folder.
    """
    is_name = isinstance(given, str) and given not in ("", ".", "..") and not set(given) & {"/", "\\", "\0"}
    if not is_name:
        raise SettingError(EXTENDS, shortened(given), 'the name of a file in the same folder, as in "base.toml"')
    assert isinstance(given, str)
    return given
