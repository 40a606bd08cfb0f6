"""Headers of encoded tensors: type and shape of the decoded tensor, and one codec's result within another's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedsplit.wire.codecs import Codec, Role
from fedsplit.wire.encoded import Encoded, Fact, MalformedPacket

_TYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Form:
    """Type and shape of a decoded tensor. Codecs work on the tensor as a matrix with a row for each token.

    Attributes:
        dtype: Floating-point type.
        shape: Shape of the tensor.

    Example:
        >>> form = Form(torch.float32, (2, 3, 8))
        >>> form.rows, form.width
        (6, 8)
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def width(self) -> int:
        """Length of the last dimension; 1 for a scalar."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        """Number of vectors along the last dimension."""
        return math.prod(self.shape[:-1])

    @property
    def count(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def header(self) -> dict[str, Fact]:
        """Returns the header of a tensor with this form."""
        return {"dtype": str(self.dtype).removeprefix("torch."), "shape": self.shape}

    def tensor(self, matrix: Tensor) -> Tensor:
        """Returns a matrix (rows, width) as a tensor of this form."""
        return matrix.reshape(self.shape).to(self.dtype)


def form_of(tensor: Tensor, role: Role) -> Form:
    """Returns the form in which a tensor arrives.

    Gradients by float16 hidden states arrive as float32, since small gradients become zero in float16.
    """
    widens = role.kind == "gradient" and role.dtype == torch.float16
    return Form(torch.float32 if widens else tensor.dtype, tuple(tensor.shape))


def form_in(encoded: Encoded, role: Role) -> Form:
    """Returns the form in the header of an encoded tensor.

    Raises:
        MalformedPacket: The type is no floating-point type, or the tensor would be too large for the role.
    """
    dtype = _TYPES.get(encoded.dtype)
    if dtype is None:
        raise MalformedPacket(f"{encoded.dtype[:40]} is no floating-point type")
    shape = encoded.fact("shape", tuple)
    if math.prod(shape) > role.most:
        raise MalformedPacket(f"a tensor of shape {shape} has more than {role.most} values")
    return Form(dtype, shape)


def matrix_of(tensor: Tensor) -> Tensor:
    """Returns the values of a tensor as a matrix (rows, width) of float32 on the CPU."""
    width = tensor.shape[-1] if tensor.ndim else 1
    rows = math.prod(tensor.shape[:-1])
    # Both lengths: for a tensor without values, `reshape` could not find out a length of -1.
    return tensor.detach().to("cpu", torch.float32).reshape(rows, width)


def array_in(
    encoded: Encoded,
    name: str,
    kind: type[np.generic],
    *shape: int,
) -> Tensor:
    """Returns an array of an encoded tensor.

    Args:
        encoded: The encoded tensor.
        name: Name of the array.
        kind: Type of the array.
        *shape: Shape of the array.

    Raises:
        MalformedPacket: The array is missing, or has another type or shape.
    """
    array = encoded.array(name)
    if array.dtype != kind or array.shape != shape:
        expected = f"{shape} of {np.dtype(kind)}"
        raise MalformedPacket(f"the array {name[:40]!r} is {array.shape} of {array.dtype}, not {expected}")
    return torch.from_numpy(array)


def nested(parts: Mapping[str, Encoded]) -> tuple[dict[str, np.ndarray], dict[str, Fact]]:
    """Returns the arrays and the facts of some encoded tensors, to be sent within another encoded tensor.

    Args:
        parts: Encoded tensors by name. The name becomes a prefix.

    Example:
        >>> arrays, facts = nested({"kept": Encoded({"values": np.zeros(2)}, {"dtype": "float64"})})
        >>> list(arrays), facts
        (['kept.values'], {'kept.dtype': 'float64'})
    """
    arrays: dict[str, np.ndarray] = {}
    facts: dict[str, Fact] = {}
    for prefix, encoded in parts.items():
        arrays |= {f"{prefix}.{name}": array for name, array in encoded.arrays.items()}
        facts |= {f"{prefix}.{name}": fact for name, fact in encoded.header.items()}
    return arrays, facts


def part_of(encoded: Encoded, prefix: str) -> Encoded:
    """Returns an encoded tensor that `nested` has put within another one."""
    dot = f"{prefix}."
    arrays = {name.removeprefix(dot): array for name, array in encoded.arrays.items() if name.startswith(dot)}
    header = {name.removeprefix(dot): fact for name, fact in encoded.header.items() if name.startswith(dot)}
    return Encoded(arrays, header)


def decoded_part(
    encoded: Encoded,
    prefix: str,
    codec: Codec,
    role: Role,
    shape: tuple[int, ...],
) -> Tensor:
    """Decodes an encoded tensor that `nested` has put within another one.

    Args:
        encoded: The outer encoded tensor.
        prefix: Name of the inner one.
        codec: Codec of the inner one.
        role: Place of the outer tensor.
        shape: Shape of the inner tensor.

    Returns:
        Matrix of float32.

    Raises:
        MalformedPacket: No encoder makes an inner tensor like this.
    """
    expected = replace(role, most=math.prod(shape))  # before any memory is taken
    tensor = codec.decode(part_of(encoded, prefix), expected)
    if tuple(tensor.shape) != shape or not tensor.is_floating_point():
        raise MalformedPacket(f"the part {prefix!r} is {tuple(tensor.shape)} of {tensor.dtype}, not {shape}")
    return tensor.to(torch.float32)
