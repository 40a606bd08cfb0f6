"""Settings, read from the fields of dataclasses: name, type, default, validator, help text and alias."""

from __future__ import annotations

import dataclasses
import numbers
import os
from collections.abc import Iterator
from typing import Any, get_args, get_origin, get_type_hints

from fedsplit.settings.validators import Validator


def setting(default: object, allowed: Validator, help: str, alias: str = "") -> Any:
    """Returns a field of a dataclass that is a setting.

    Args:
        default: Value if the user gives none.
        allowed: Validator of the values.
        help: Help text.
        alias: Second flag, such as a name that other programs use; empty for none.

    Returns:
        A `dataclasses.Field`. The type is `Any`, as that of `dataclasses.field`, so that a field of any type can have
        it as its default.
    """
    return dataclasses.field(default=default, metadata={"allowed": allowed, "help": help, "alias": alias})


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting of a run.

    Attributes:
        name: Dotted name, such as `train.batch_size`.
        python_type: Type of a value: bool, int, float, str, or tuple for a list.
        item_type: Type of the items of a list, int or str; None for a setting that is no list.
        default: Value if the user gives none.
        allowed: Validator of the values.
        help: Help text.
        alias: Second flag; empty for none.

    Example:
        >>> from fedsplit.settings.validators import at_least
        >>> clients = Setting("clients", int, None, 8, at_least(1, 9), "clients in the federation")
        >>> clients.accepts(4), clients.accepts(0), clients.accepts(True)
        (True, False, False)
        >>> clients.words
        'a whole number from 1 to 9'
    """

    name: str
    python_type: type[Any]
    item_type: type[Any] | None
    default: Any
    allowed: Validator
    help: str
    alias: str = ""

    @property
    def section(self) -> str:
        """Name of the section that the setting belongs to; empty for a setting of the run itself."""
        return self.name.rpartition(".")[0]

    @property
    def field(self) -> str:
        """Name of the field in its section, such as `batch_size`."""
        return self.name.rpartition(".")[2]

    @property
    def words(self) -> str:
        """The possible values, in words."""
        words = self.allowed.words
        return words.replace("a number", "a whole number") if self.python_type is int else words

    def allowed_for(self, value: object) -> str:
        """Returns the possible values in words, for a refused value; for some values more precisely than `words`."""
        explain = self.allowed.explain
        return explain(value) if explain is not None and isinstance(value, str) else self.words

    def in_python_type(self, value: object) -> Any:
        """Returns a value of another type in Python's type of the setting, such as a float for a number of NumPy.

        A value that does not stand for one of the setting's type is returned as it is.
        """
        if self.item_type is not None and isinstance(value, list | tuple):
            return tuple(_in_python_type(item, self.item_type) for item in value)
        return _in_python_type(value, self.python_type)

    def accepts(self, value: object) -> bool:
        """Returns True if the setting may have a value. The value may be of any type."""
        if not isinstance(value, (float, int) if self.python_type is float else self.python_type):
            return False
        if isinstance(value, bool) and self.python_type is not bool:  # to Python, True is an int
            return False
        # `type`, since True is an instance of int.
        if isinstance(value, tuple) and any(type(item) is not self.item_type for item in value):
            return False
        try:
            for text in self._texts(value):
                text.encode()
            return bool(self.allowed.test(value))
        except (ValueError, OverflowError):  # half a character (a lone surrogate), or a number too large for a float
            return False

    def _texts(self, value: Any) -> tuple[str, ...]:
        """Returns the texts in a value of the setting's type."""
        if self.python_type is str:
            return (value,)
        return tuple(value) if self.item_type is str else ()


def _in_python_type(value: object, type_: type) -> object:
    """Returns a value as an object of Python's type `type_`, if the value stands for such an object; else as it is."""
    if type_ is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    # A bool is an int, and an int is a number of any library: Python's own values come first.
    if isinstance(value, bool | int | float):
        return value
    if type_ in (int, float) and isinstance(value, numbers.Integral):
        return int(value)
    if type_ is float and isinstance(value, numbers.Real):
        return float(value)
    return value


def settings_of(cls: type, section: str = "") -> Iterator[Setting]:
    """Yields the settings among the fields of a dataclass.

    Args:
        cls: The dataclass.
        section: Name of the section that the class stands for; empty for settings without a section.
    """
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if "allowed" not in field.metadata:
            continue
        hint = hints[field.name]
        is_list = get_origin(hint) is tuple
        yield Setting(
            name=f"{section}.{field.name}" if section else field.name,
            python_type=tuple if is_list else hint,
            item_type=get_args(hint)[0] if is_list else None,
            default=field.default,
            **field.metadata,
        )
