"""The codec zstd: compresses the arrays of another codec without loss."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import zstandard
from torch import Tensor

from fedsplit.wire.casting import Raw
from fedsplit.wire.codecs import Codec, Place, Role
from fedsplit.wire.encoded import ARRAY_TYPES, Encoded, Fact, MalformedPacket

_BYTES_OF_VALUE = 16
"""Most bytes of arrays for each value of a tensor, over all codecs. A decoder takes no more memory."""

_FURTHER_BYTES = 2**16
"""Bytes of arrays that do not depend on the number of values."""

_FORM = "form."
"""Prefix of a fact with type and shape of an array before the compression."""


class Zstd(Codec):
    """Compresses the arrays of a codec by zstd; `--wire.codec zstd`, or behind another codec, as in `int8,zstd`.

    The first bytes of all values come first, then the second bytes, and so on: the bytes of exponents lie together,
    and resemble each other.

    Example:
        >>> import torch
        >>> from fedsplit.wire.packets import StepKey
        >>> role = Role("activation", "up", StepKey(round=1, client=0, step=0))
        >>> Zstd(Raw(), level=3).encode(torch.zeros(1000), role).nbytes
        19
    """

    def __init__(self, inner: Codec, level: int) -> None:
        """Wraps a codec.

        Args:
            inner: Codec with the arrays to compress.
            level: Effort of the compression, from 1 to 19.
        """
        self._inner = inner
        self._level = level
        self.needs_examples = inner.needs_examples

    @classmethod
    def at(cls, place: Place) -> Zstd:
        """Returns a new codec around the codecs before it in the chain, or around `raw`."""
        assert place.parameter is not None
        return cls(place.rest or Raw(), int(place.parameter))

    def encode(self, tensor: Tensor, role: Role) -> Encoded:
        """Encodes a tensor by the inner codec, and compresses the arrays."""
        encoded = self._inner.encode(tensor, role)
        compressor = zstandard.ZstdCompressor(self._level)
        arrays = {}
        forms: dict[str, Fact] = {}
        for name, array in encoded.arrays.items():
            by_byte = np.ascontiguousarray(array).reshape(-1, 1).view(np.uint8).T
            arrays[name] = np.frombuffer(compressor.compress(by_byte.tobytes()), np.uint8)
            forms[_FORM + name] = (ARRAY_TYPES.index(array.dtype.name), *array.shape)
        return Encoded(arrays, {**encoded.header, **forms})

    def decode(self, encoded: Encoded, role: Role) -> Tensor:
        """Decodes a tensor.

        Raises:
            MalformedPacket: The arrays are not compressed, have another size than the header says, or are too large.
        """
        left = _BYTES_OF_VALUE * role.most + _FURTHER_BYTES
        arrays = {}
        for name, compressed in encoded.arrays.items():
            arrays[name] = _decompressed(compressed, *_form_in(encoded, name), left)
            # All arrays of a tensor share one limit.
            left -= arrays[name].nbytes
        header = {name: fact for name, fact in encoded.header.items() if not name.startswith(_FORM)}
        return self._inner.decode(Encoded(arrays, header), role)

    def state(self) -> Mapping[int, Mapping[str, Tensor]]:
        """Returns the state of the inner codec."""
        return self._inner.state()

    def restore(self, states: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Replaces the state of the inner codec."""
        self._inner.restore(states)


def _form_in(encoded: Encoded, name: str) -> tuple[np.dtype, tuple[int, ...]]:
    """Returns type and shape of an array before the compression.

    Raises:
        MalformedPacket: The header has no such form.
    """
    form = encoded.fact(_FORM + name, tuple)
    if not form or form[0] >= len(ARRAY_TYPES):
        raise MalformedPacket(f"the form of the array {name[:40]!r} has no type")
    return np.dtype(ARRAY_TYPES[form[0]]), tuple(form[1:])


def _decompressed(
    compressed: np.ndarray,
    dtype: np.dtype,
    shape: tuple[int, ...],
    most: int,
) -> np.ndarray:
    """Returns an array from its compressed bytes.

    Args:
        compressed: Compressed bytes.
        dtype: Type of the array.
        shape: Shape of the array.
        most: Most bytes of the array.

    Raises:
        MalformedPacket: The bytes are not those of an array of the form.
    """
    size = math.prod(shape) * dtype.itemsize
    if size > most or compressed.dtype != np.uint8:
        raise MalformedPacket(f"an array of shape {shape} of {dtype} is not what was sent compressed")
    data = compressed.tobytes()
    try:
        # The size in the data decides how much memory is taken, and so it is compared first.
        if zstandard.frame_content_size(data) != size:
            raise MalformedPacket(f"an array is not of {size} bytes, as its header says")
        by_byte = zstandard.ZstdDecompressor().decompress(data, size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise MalformedPacket(f"an array cannot be decompressed: {error}") from None
    if len(by_byte) != size:
        raise MalformedPacket(f"an array is not of {size} bytes, as its header says")
    values = np.frombuffer(by_byte, np.uint8).reshape(dtype.itemsize, -1).T
    return np.ascontiguousarray(values).view(dtype).reshape(shape)
