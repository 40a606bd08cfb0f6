"""Blobs: encoded tensors as bytes in one tensor, for messages that carry plain tensors."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsplit.wire.encoded import Encoded, MalformedPacket, check_encoded, is_count, may_cross

_LENGTH = struct.Struct("<I")


def to_blob(encoded: Encoded) -> Tensor:
    """Returns an encoded tensor as bytes: the length of a header in JSON, the header, and the arrays.

    Example:
        >>> blob = to_blob(Encoded({"values": np.ones(3, np.float32)}, {"dtype": "float32"}))
        >>> blob.dtype, from_blob(blob).array("values").tolist()
        (torch.uint8, [1.0, 1.0, 1.0])
    """
    forms = {name: [array.dtype.str, array.shape] for name, array in encoded.arrays.items()}
    header = json.dumps([forms, dict(encoded.header)]).encode()
    arrays = [array.tobytes() for array in encoded.arrays.values()]
    pieces = [_LENGTH.pack(len(header)), header, *arrays]
    # A bytearray, since torch warns of memory that it may not write to.
    return torch.frombuffer(bytearray(b"".join(pieces)), dtype=torch.uint8)


def from_blob(blob: Tensor) -> Encoded:
    """Returns the encoded tensor in a blob.

    Raises:
        MalformedPacket: The bytes are no encoded tensor.
    """
    if blob.dtype != torch.uint8 or blob.ndim != 1:
        raise MalformedPacket(f"a tensor {tuple(blob.shape)} of {blob.dtype} holds no encoded tensor")
    data = blob.contiguous().numpy().tobytes()
    try:
        (length,) = _LENGTH.unpack_from(data)
        forms, facts = json.loads(data[_LENGTH.size : _LENGTH.size + length])
        encoded = _read(data, _LENGTH.size + length, forms, facts)
    # The bytes come from a peer: whatever is wrong with them is one error.
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError, struct.error):
        raise MalformedPacket("the bytes are no encoded tensor") from None
    check_encoded("a blob", encoded)
    return encoded


def _read(data: bytes, place: int, forms: Any, facts: Any) -> Encoded:
    """Returns the arrays behind a place, with the facts.

    Raises:
        ValueError, TypeError, AttributeError: The bytes do not fit the forms.
    """
    arrays = {}
    for name, (kind, shape) in forms.items():
        # As a text, since `np.dtype` takes None and lists for types, too.
        dtype = np.dtype(str(kind))
        if not may_cross(dtype) or not all(map(is_count, shape)):
            raise ValueError("an array is of a type or shape that may not cross")
        count = math.prod(shape)
        arrays[name] = np.frombuffer(data, dtype, count, place).reshape(shape)  # refuses more than there is
        place += count * dtype.itemsize
    if place != len(data):
        raise ValueError("there are bytes behind the last array")
    header = {name: tuple(fact) if isinstance(fact, list) else fact for name, fact in facts.items()}
    return Encoded(arrays, header)
