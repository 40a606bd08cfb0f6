"""A tensor as it lies on the wire: the arrays that a codec made of it, and a small header."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

Fact = bool | int | float | str | tuple[int, ...]
"""A value in a header; a tuple holds whole numbers from 0, such as a shape."""

MOST_ARRAYS = 8
MOST_FACTS = 8
_LONGEST_TEXT = 64
_MOST_DIMENSIONS = 3
LARGEST_NUMBER = 2**63 - 1

_ARRAYS = frozenset({"float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool"})
"""Types of the arrays that may cross."""

T = TypeVar("T")


class MalformedPacket(ValueError):
    """A packet has a field of the wrong type, or a value that the field cannot have."""


@dataclass(frozen=True)
class Encoded:
    """A tensor that a codec has encoded.

    Only the codec that made it knows what arrays and header mean. The bytes of the arrays are counted as traffic; the
    header is not, so `check_encoded` keeps it small.

    Attributes:
        arrays: Arrays by name.
        header: Facts by name that a codec needs to decode. "dtype" is the type of the decoded tensor.

    Example:
        >>> encoded = Encoded({"values": np.zeros((2, 3), np.float32)}, {"dtype": "float32"})
        >>> encoded.nbytes, encoded.dtype
        (24, 'float32')
    """

    arrays: Mapping[str, np.ndarray]
    header: Mapping[str, Fact] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes on the wire, read off the arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def dtype(self) -> str:
        """Name of the type of the decoded tensor, such as "float32"; empty where the header does not name it."""
        return str(self.header.get("dtype", ""))

    def array(self, name: str) -> np.ndarray:
        """Returns an array.

        Raises:
            MalformedPacket: There is none of that name.
        """
        if name not in self.arrays:
            raise MalformedPacket(f"there is no array {name!r} in what was sent")
        return self.arrays[name]

    def fact(self, name: str, kind: type[T]) -> T:
        """Returns a fact of the header.

        Args:
            name: Its name.
            kind: Its type.

        Raises:
            MalformedPacket: There is none of that name, or it has another type.
        """
        value = self.header.get(name)
        if not isinstance(value, kind):
            raise MalformedPacket(f"the header's {name!r} is not of type {kind.__name__}")
        return value


def check_encoded(name: str, encoded: object) -> None:
    """Makes sure that an encoded tensor has the right form, so that nothing behind this has to expect another one.

    Args:
        name: Name of the tensor, for messages.
        encoded: The encoded tensor.

    Raises:
        MalformedPacket: Its form is wrong.
    """
    if not isinstance(encoded, Encoded):
        raise MalformedPacket(f"{name} of a packet is {shown(encoded)}, not an encoded tensor")
    for records, most in ((encoded.arrays, MOST_ARRAYS), (encoded.header, MOST_FACTS)):
        if not isinstance(records, Mapping) or len(records) > most or not all(map(_is_text, records)):
            raise MalformedPacket(f"{name} of a packet does not have up to {most} arrays and facts by name")
    for array in encoded.arrays.values():
        _check_array(name, array)
    for fact, value in encoded.header.items():
        if not is_fact(value):
            raise MalformedPacket(f"{name} of a packet has {shown(value)} as {shown(fact)} in its header")
    if not encoded.dtype:
        raise MalformedPacket(f"{name} of a packet does not say what type it has")


def _check_array(name: str, array: object) -> None:
    if not isinstance(array, np.ndarray):
        raise MalformedPacket(f"{name} of a packet is {shown(array)}, not an array")
    if not may_cross(array.dtype) or array.ndim > _MOST_DIMENSIONS:
        raise MalformedPacket(f"{name} of a packet is an array of {array.ndim} dimensions of {array.dtype}")


def may_cross(form: np.dtype) -> bool:
    """Returns True if arrays of a type may cross; those of another machine's byte order may not."""
    return form.name in _ARRAYS and form.isnative


def is_fact(value: Any) -> bool:
    """Returns True if a value may stand in a header."""
    if type(value) is tuple:
        return len(value) <= MOST_FACTS and all(map(is_count, value))
    if type(value) is int:
        return abs(value) <= LARGEST_NUMBER
    return type(value) in (bool, float) or _is_text(value)


def is_count(value: Any) -> bool:
    """Returns True for a whole number from 0."""
    return type(value) is int and 0 <= value <= LARGEST_NUMBER


def _is_text(value: Any) -> bool:
    return type(value) is str and len(value) <= _LONGEST_TEXT


def shown(value: object) -> str:
    """Returns a value for a message; only its type where the text may be long, or raise an error."""
    is_short = type(value) in (bool, float) or value is None or is_count(value)
    return repr(value) if is_short or (type(value) is str and len(value) < 40) else f"a {type(value).__name__}"
