"""Fields of settings: default, check, help text, and the values that a setting may have."""

from __future__ import annotations

import dataclasses
import numbers
import os
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from fedsplit.settings.validators import Validator


def setting(default: Any, allowed: Validator, help: str, alias: str = "") -> Any:
    """A field with its default, its check, its help text and the name people know from elsewhere."""
    return field(default=default, metadata={"allowed": allowed, "help": help, "alias": alias})


_TYPES: Mapping[Any, tuple[type, ...]] = {float: (float, int), tuple[int, ...]: (tuple,), tuple[str, ...]: (tuple,)}

_ITEMS: Mapping[Any, type] = {tuple[int, ...]: int, tuple[str, ...]: str}


def plain(kind: Any, value: Any) -> Any:
    """A value in Python's own type of a setting, where it is of one that stands for it; else as it is."""
    if kind in _ITEMS and isinstance(value, list | tuple):
        return tuple(plain(_ITEMS[kind], item) for item in value)
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, bool | int | float):
        return value
    if kind in (int, float) and isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if kind is float and isinstance(value, numbers.Real) else value


def suits(leaf: dataclasses.Field[Any], kind: Any, value: Any) -> bool:
    """Whether a setting may have a value.

    Args:
        leaf: The setting's field.
        kind: Its type.
        value: The value, of that type or not.
    """
    if not isinstance(value, _TYPES.get(kind, (kind,))) or (isinstance(value, bool) and kind is not bool):
        return False
    if kind in _ITEMS and not all(type(item) is _ITEMS[kind] for item in value):
        return False
    try:
        for text in (value,) if kind is str else value if kind == tuple[str, ...] else ():
            text.encode()
        return bool(leaf.metadata["allowed"].test(value))
    except (ValueError, OverflowError):  # half a character, or a number that is none
        return False


def words_of(leaf: dataclasses.Field[Any], kind: Any) -> str:
    """What a setting may be, in words."""
    words: str = leaf.metadata["allowed"].words
    return words.replace("a number", "a whole number") if kind is int else words
