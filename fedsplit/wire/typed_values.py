"""Values of declared types as bytes and back: a header in JSON, followed by the tensors as safetensors.

A type hint decides the form of a value: numbers, texts, tensors, tuples, sets, mappings, and dataclasses of such
values. The reader knows the type, so that the bytes name no class. Every field is checked as it is read, and nothing is
unpickled.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import struct
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from torch import Tensor

from fedsplit.tensor_files import tensors_as_bytes, tensors_from_bytes

_LENGTH = struct.Struct("<I")
"""Length of the header in bytes, in front of the header."""

_LONGEST_SHOWN = 40


class MalformedValue(Exception):
    """Bytes do not hold a value of the expected type. The message is one line, and names the field."""


class _Tensors:
    """The tensors of a value that is read. Each belongs to one place of the value."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._left = dict(enumerate(tensors))

    def take(self, number: Any, path: str) -> Tensor:
        """Returns a tensor by its number in the header."""
        if type(number) is not int or number not in self._left:
            raise MalformedValue(f"{path} is {_shown(number)}, not the number of a tensor that came with it")
        return self._left.pop(number)

    def check_all_taken(self) -> None:
        """Raises an error if a tensor came that no field names."""
        if self._left:
            raise MalformedValue(f"{len(self._left)} tensors came that no field names")


@dataclass(frozen=True)
class Form:
    """The way of one type to JSON and back.

    Attributes:
        write: Takes a value and a list, which it extends by the tensors of the value; returns what stands in the JSON.
        read: Takes what stands in the JSON, the tensors, and the name of the field for messages; returns the value.
            Raises a `MalformedValue` for anything else than what `write` writes.
    """

    write: Callable[[Any, list[Tensor]], Any]
    read: Callable[[Any, _Tensors, str], Any]


def as_bytes(form: Form, value: Any) -> bytes:
    """Returns a value as bytes.

    Args:
        form: Form of the value's type.
        value: The value.

    Example:
        >>> form = form_of(tuple[int, ...])
        >>> from_bytes(form, as_bytes(form, (1, 2)))
        (1, 2)
    """
    tensors: list[Tensor] = []
    header = json.dumps(form.write(value, tensors)).encode()
    # safetensors has names for tensors, and no numbers.
    named = {str(number): tensor for number, tensor in enumerate(tensors)}
    return b"".join([_LENGTH.pack(len(header)), header, tensors_as_bytes(named)])


def from_bytes(form: Form, data: bytes) -> Any:
    """Returns the value that `as_bytes` wrote.

    Args:
        form: Form of the value's type.
        data: The bytes. A stranger's may be any.

    Raises:
        MalformedValue: The bytes hold no value of the type.

    Example:
        >>> from_bytes(form_of(int), as_bytes(form_of(str), "seven"))
        Traceback (most recent call last):
        fedsplit.wire.typed_values.MalformedValue: the value is 'seven', not a whole number
    """
    header, tensors = _parts_of(data)
    left = _Tensors(tensors)
    value = form.read(header, left, "the value")
    left.check_all_taken()
    return value


def _parts_of(data: bytes) -> tuple[Any, list[Tensor]]:
    """Returns the parsed header, and the tensors in the order of their numbers."""
    try:
        (length,) = _LENGTH.unpack_from(data)
        end = _LENGTH.size + length
        # A slice beyond the end would be shorter, and no error.
        if end > len(data):
            raise ValueError("the header is cut off")
        header = json.loads(data[_LENGTH.size : end])
        named = tensors_from_bytes(data[end:])
        return header, [named[str(number)] for number in range(len(named))]
    except (struct.error, ValueError, KeyError, RecursionError) as error:
        raise MalformedValue("the bytes are no header in JSON with tensors behind it") from error


@functools.cache
def form_of(hint: Any) -> Form:
    """Returns the form of a type.

    Args:
        hint: A type hint, such as `int`, `Tensor`, `dict[str, Tensor]`, `float | None` or a dataclass.

    Raises:
        TypeError: The type has no form.

    Example:
        >>> form_of(float | None).write(None, [])
        >>> form_of(object)
        Traceback (most recent call last):
        TypeError: values of <class 'object'> have no form as bytes
    """
    if hint in _PLAIN:
        return _plain(hint)
    if hint is Tensor:
        return _TENSOR
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _dataclass(hint)
    origin = get_origin(hint)
    arguments = get_args(hint)
    if origin is Literal:
        return _literal(arguments)
    if origin in (Union, types.UnionType):
        return _any_plain(arguments) if _PLAIN.keys() >= {*arguments} else _optional(hint, arguments)
    if origin is tuple and arguments[1:] == (...,):
        return _sequence(tuple, form_of(arguments[0]))
    if origin is frozenset:
        return _sequence(frozenset, form_of(arguments[0]))
    if origin in (dict, Mapping):
        return _mapping(*map(form_of, arguments))
    raise TypeError(f"values of {hint} have no form as bytes")


_PLAIN: Mapping[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    type(None): "null",
}
"""Words for the types that JSON has."""


def _plain(kind: type) -> Form:
    """Returns the form of a type that JSON has."""

    def read(value: Any, tensors: _Tensors, path: str) -> Any:
        # `type(value)`: `isinstance` would accept True as a number.
        if type(value) is not kind:
            raise MalformedValue(f"{path} is {_shown(value)}, not {_PLAIN[kind]}")
        return value

    # A whole number in place of a float would be read as another type than it was declared with.
    return Form(lambda value, tensors: float(value) if kind is float else value, read)


def _any_plain(kinds: tuple[Any, ...]) -> Form:
    """Returns the form of a value of one of several types that JSON has."""
    words = " or ".join(_PLAIN[kind] for kind in kinds)

    def read(value: Any, tensors: _Tensors, path: str) -> Any:
        if type(value) not in kinds:
            raise MalformedValue(f"{path} is {_shown(value)}, not {words}")
        return value

    return Form(lambda value, tensors: value, read)


def _write_tensor(value: Tensor, tensors: list[Tensor]) -> int:
    tensors.append(value)
    return len(tensors) - 1


_TENSOR = Form(_write_tensor, lambda value, tensors, path: tensors.take(value, path))


def _literal(choices: tuple[Any, ...]) -> Form:
    """Returns the form of one of a few texts."""

    def read(value: Any, tensors: _Tensors, path: str) -> Any:
        if type(value) is not str or value not in choices:
            raise MalformedValue(f"{path} is {_shown(value)}, not one of {', '.join(choices)}")
        return value

    return Form(lambda value, tensors: value, read)


def _optional(hint: Any, arguments: tuple[Any, ...]) -> Form:
    """Returns the form of a value that may be None."""
    others = [argument for argument in arguments if argument is not type(None)]
    if len(others) != 1 or len(arguments) != 2:
        raise TypeError(f"values of {hint} have no form as bytes")
    form = form_of(others[0])
    return Form(
        lambda value, tensors: None if value is None else form.write(value, tensors),
        lambda value, tensors, path: None if value is None else form.read(value, tensors, path),
    )


def _sequence(kind: Callable[[list[Any]], Any], item: Form) -> Form:
    """Returns the form of a tuple, or of a set, whose order is that of its items."""

    def write(value: Any, tensors: list[Tensor]) -> list[Any]:
        items = value if kind is tuple else sorted(value)
        return [item.write(each, tensors) for each in items]

    def read(value: Any, tensors: _Tensors, path: str) -> Any:
        if type(value) is not list:
            raise MalformedValue(f"{path} is {_shown(value)}, not a list")
        return kind([item.read(each, tensors, f"{path}[{number}]") for number, each in enumerate(value)])

    return Form(write, read)


def _mapping(key: Form, item: Form) -> Form:
    """Returns the form of a mapping: pairs in a list, since keys in JSON are texts only."""

    def write(
        value: Mapping[Any, Any],
        tensors: list[Tensor],
    ) -> list[list[Any]]:
        return [[key.write(name, tensors), item.write(each, tensors)] for name, each in value.items()]

    def read(value: Any, tensors: _Tensors, path: str) -> dict[Any, Any]:
        if type(value) is not list or not all(type(pair) is list and len(pair) == 2 for pair in value):
            raise MalformedValue(f"{path} is {_shown(value)}, not a list of names and values")
        named: dict[Any, Any] = {}
        for name, each in value:
            known = key.read(name, tensors, f"a name in {path}")
            if known in named:
                raise MalformedValue(f"{path} has {_shown(known)} twice")
            named[known] = item.read(each, tensors, f"{path}[{_shown(known)}]")
        return named

    return Form(write, read)


def _dataclass(kind: type) -> Form:
    """Returns the form of a dataclass: all fields by name."""
    hints = typing.get_type_hints(kind)
    forms = {field.name: form_of(hints[field.name]) for field in dataclasses.fields(kind)}

    def write(value: Any, tensors: list[Tensor]) -> dict[str, Any]:
        return {name: form.write(getattr(value, name), tensors) for name, form in forms.items()}

    def read(value: Any, tensors: _Tensors, path: str) -> Any:
        if type(value) is not dict or value.keys() != forms.keys():
            raise MalformedValue(f"{path} is {_shown(value)}, not the fields of a {kind.__name__}")
        fields = {name: form.read(value[name], tensors, f"{kind.__name__}.{name}") for name, form in forms.items()}
        return kind(**fields)

    return Form(write, read)


def _shown(value: Any) -> str:
    """Returns a value for a message, in one short line."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"
