"""A tensor on the wire: arrays from a codec, and a small header."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

Fact = bool | int | float | str | tuple[int, ...]
"""A value in a header; a tuple holds whole numbers from 0, such as a shape."""

# Names and headers are framing and no payload, so nothing large may cross in them. A chain of codecs has the arrays
# and the facts of all its codecs.
MOST_ARRAYS = 8
MOST_FACTS = 32
_MOST_NUMBERS = 8
_LONGEST_TEXT = 64
_MOST_DIMENSIONS = 3
LARGEST_NUMBER = 2**63 - 1  # JSON has no largest number, but numpy and torch count in int64

ARRAY_TYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool")
"""Types of arrays that may cross. Arrays of objects may not: to read one would unpickle code."""

T = TypeVar("T")


class MalformedPacket(ValueError):
    """A packet has a field of the wrong type, or an impossible value in a field."""


@dataclass(frozen=True)
class Encoded:
    """A tensor that a codec has encoded.

    The meaning of arrays and header is up to the codec. The bytes of the arrays are counted as traffic. The header is
    counted as framing, and `check_encoded` allows only a small header.

    Attributes:
        arrays: Arrays by name.
        header: Facts for the decoder, by name. "dtype" is the type of the decoded tensor.

    Example:
        >>> encoded = Encoded({"values": np.zeros((2, 3), np.float32)}, {"dtype": "float32"})
        >>> encoded.nbytes, encoded.dtype
        (24, 'float32')
    """

    arrays: Mapping[str, np.ndarray]
    header: Mapping[str, Fact] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def dtype(self) -> str:
        """Name of the type of the decoded tensor, such as "float32"; empty if the header has no type."""
        return str(self.header.get("dtype", ""))

    def array(self, name: str) -> np.ndarray:
        """Returns the array with a name.

        Raises:
            MalformedPacket: No array has the name.
        """
        if name not in self.arrays:
            raise MalformedPacket(f"there is no array {name!r} in what was sent")
        return self.arrays[name]

    def fact(self, name: str, kind: type[T]) -> T:
        """Returns a fact of the header.

        Args:
            name: Name of the fact.
            kind: Type of the fact.

        Raises:
            MalformedPacket: No fact has the name and the type.
        """
        value = self.header.get(name)
        if not isinstance(value, kind):
            raise MalformedPacket(f"the header's {name!r} is not of type {kind.__name__}")
        return value


def check_encoded(name: str, encoded: object) -> None:
    """Checks the form of an encoded tensor, so that later code may rely on the form.

    Args:
        name: Name of the tensor, for messages.
        encoded: The encoded tensor.

    Raises:
        MalformedPacket: The form is wrong.

    Example:
        >>> check_encoded("hidden", Encoded({"values": np.zeros((2, 3), np.complex64)}, {"dtype": "complex64"}))
        Traceback (most recent call last):
        fedsplit.wire.encoded.MalformedPacket: hidden of a packet is an array of 2 dimensions of complex64
    """
    if not isinstance(encoded, Encoded):
        raise MalformedPacket(f"{name} of a packet is {shown(encoded)}, not an encoded tensor")
    for records, most in ((encoded.arrays, MOST_ARRAYS), (encoded.header, MOST_FACTS)):
        is_small = isinstance(records, Mapping) and len(records) <= most
        if not is_small or not all(map(_is_text, records)):
            raise MalformedPacket(f"{name} of a packet does not have up to {most} arrays and facts by name")
    for array in encoded.arrays.values():
        _check_array(name, array)
    for fact, value in encoded.header.items():
        if not is_fact(value):
            raise MalformedPacket(f"{name} of a packet has {shown(value)} as {shown(fact)} in its header")
    if not encoded.dtype:  # every codec needs the type, and the check of the type is the codec's
        raise MalformedPacket(f"{name} of a packet does not say what type it has")


def _check_array(name: str, array: object) -> None:
    if not isinstance(array, np.ndarray):
        raise MalformedPacket(f"{name} of a packet is {shown(array)}, not an array")
    if not may_cross(array.dtype) or array.ndim > _MOST_DIMENSIONS:
        raise MalformedPacket(f"{name} of a packet is an array of {array.ndim} dimensions of {array.dtype}")


def may_cross(form: np.dtype) -> bool:
    """Returns True if arrays of a type may cross. Arrays with a foreign byte order may not.

    Example:
        >>> may_cross(np.dtype("float32")), may_cross(np.dtype("object"))
        (True, False)
    """
    return form.name in ARRAY_TYPES and form.isnative


def is_fact(value: Any) -> bool:
    """Returns True if a header may contain a value.

    Example:
        >>> is_fact((2, 3)), is_fact([2, 3])
        (True, False)
    """
    if type(value) is tuple:
        return len(value) <= _MOST_NUMBERS and all(map(is_count, value))
    if type(value) is int:
        return abs(value) <= LARGEST_NUMBER
    return type(value) in (bool, float) or _is_text(value)


def is_count(value: Any) -> bool:
    """Returns True for a whole number from 0.

    Example:
        >>> is_count(3), is_count(-1), is_count(True)
        (True, False, False)
    """
    # Not `isinstance`, for which True is a number, too.
    return type(value) is int and 0 <= value <= LARGEST_NUMBER


def _is_text(value: Any) -> bool:
    return type(value) is str and len(value) <= _LONGEST_TEXT


def shown(value: object) -> str:
    """Returns a short text about a value, for messages. A `repr` could be long, or raise an error.

    Example:
        >>> shown(3), shown([0] * 1000)
        ('3', 'a list')
    """
    is_short_text = type(value) is str and len(value) < 40
    is_number = type(value) in (bool, float) or is_count(value)
    if value is None or is_number or is_short_text:
        return repr(value)
    return f"a {type(value).__name__}"
