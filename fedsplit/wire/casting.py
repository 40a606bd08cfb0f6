"""The codecs `raw`, `bf16` and `fp16`: values without a change, or rounded to a narrower type."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedsplit.wire.codecs import Codec, Role
from fedsplit.wire.encoded import Encoded, Fact, MalformedPacket
from fedsplit.wire.scaling import scale_to

with warnings.catch_warnings():
    # torch warns once a process that a tensor would let code write to a read-only array. No code here writes to one.
    warnings.simplefilter("ignore")
    torch.from_numpy(np.frombuffer(b"0", np.uint8))

_FULL = 2.0**15
"""Upper bound of the largest element of a scaled gradient: half of float16's largest value."""

_NARROWED: Mapping[torch.dtype, tuple[torch.dtype, ...]] = {
    torch.bfloat16: (torch.int16, torch.float16),
    torch.float16: (torch.int16,),
    torch.float32: (torch.int16, torch.float16),
    torch.float64: (torch.int16, torch.float16),
}
"""Further types of arrays from an encoder, by the tensor's type. The bits of bfloat16 are sent as int16."""


class Cast(Codec):
    """Sends values without a change, or rounded to a narrower type.

    Attributes:
        narrow: Type for rounded floating-point values; None for no rounding.
    """

    narrow: torch.dtype | None = None

    def encode(self, tensor: Tensor, role: Role | None = None) -> Encoded:
        """Encodes a tensor.

        A gradient by float16 hidden states is sent as float16 times a power of two: half the bytes of float32, and
        small values do not become zero.
        """
        if role is not None and role.kind == "gradient" and role.dtype == torch.float16:
            # A power of two: neither this product nor the quotient at the other side loses a bit.
            scale = scale_to(_FULL, tensor)
            scaled = (tensor * scale).to(torch.float16)
            return array_as(self._to_array(scaled), "float32", scale)
        return array_as(self._to_array(tensor), str(tensor.dtype).removeprefix("torch."))

    def _to_array(self, tensor: Tensor) -> np.ndarray:
        """Returns the values of a tensor as they cross."""
        tensor = tensor.detach()
        if self.narrow is not None and tensor.is_floating_point():
            tensor = tensor.to(self.narrow)
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.view(torch.int16)  # numpy has no bfloat16; the bits cross as integers
        return tensor.contiguous().cpu().numpy()

    def decode(self, encoded: Encoded, role: Role | None = None) -> Tensor:
        """Decodes a tensor. The result is a view of the array if possible.

        Raises:
            MalformedPacket: No encoder makes an array of this type for values of the type in the header.
        """
        tensor = torch.from_numpy(encoded.array("values"))
        dtype = getattr(torch, encoded.dtype, None)
        # The name comes from the wire, and may name any object of torch.
        if not isinstance(dtype, torch.dtype) or tensor.dtype not in {dtype, *_NARROWED.get(dtype, ())}:
            raise MalformedPacket(f"an array of {tensor.dtype} cannot stand for values of type {encoded.dtype[:40]}")
        # As values of a floating-point type, int16 can only be the bits of bfloat16.
        if tensor.dtype == torch.int16 and dtype.is_floating_point:
            tensor = tensor.view(torch.bfloat16)
        tensor = tensor.to(dtype)
        return tensor / _scale(encoded) if "scale" in encoded.header else tensor


class Raw(Cast):
    """Sends values without a change; `--wire.codec raw`.

    Example:
        >>> Raw().decode(Raw().encode(torch.tensor([0.1]))).item() == torch.tensor(0.1).item()
        True
    """


class BFloat16(Cast):
    """Rounds values to 8 bits of precision: half the bytes of float32; `--wire.codec bf16`.

    Example:
        >>> BFloat16().decode(BFloat16().encode(torch.tensor([1.001])))
        tensor([1.])
    """

    narrow = torch.bfloat16


class Float16(Cast):
    """Rounds values to 11 bits of precision: half the bytes of float32; `--wire.codec fp16`.

    A power of two scales the values of each tensor, so that none exceeds float16's largest value. The error is at most
    2^-11 of the value, or 2^-39 of the tensor's largest magnitude for small values.

    Example:
        >>> Float16().decode(Float16().encode(torch.tensor([2.0**20])))
        tensor([1048576.])
    """

    def encode(self, tensor: Tensor, role: Role | None = None) -> Encoded:
        """Encodes a tensor."""
        if not tensor.is_floating_point():
            return super().encode(tensor, role)
        # The header names the type of the values behind the wire.
        gradient_is_wider = role is not None and role.kind == "gradient" and role.dtype == torch.float16
        dtype = "float32" if gradient_is_wider else str(tensor.dtype).removeprefix("torch.")
        scale = scale_to(_FULL, tensor)
        scaled = (tensor.float() * scale).to(torch.float16)
        return array_as(self._to_array(scaled), dtype, scale)


EXACT = Raw()
"""Codec for small tensors that must cross without a change, such as masks and norms, under every codec of a run."""


def array_as(array: np.ndarray, dtype: str, scale: float = 1.0) -> Encoded:
    """Returns an array as an encoded tensor.

    Args:
        array: Values of the tensor on the wire.
        dtype: Name of the tensor's type.
        scale: Factor of the values on the wire, a power of two; 1 for unscaled values.
    """
    header: dict[str, Fact] = {"dtype": dtype}
    if scale != 1:
        header["scale"] = scale
    return Encoded({"values": array}, header)


def _scale(encoded: Encoded) -> float:
    """Returns the factor of the values on the wire.

    Raises:
        MalformedPacket: The factor is not a number above 0.
    """
    scale = encoded.fact("scale", float)
    if not 0 < scale < math.inf:
        raise MalformedPacket(f"the scale is {scale}, not a number above 0")
    return scale
