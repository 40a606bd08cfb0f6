"""Encoded tensors as bytes: to the bit, and nothing else passes for one."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.wire.blobs import from_blob, to_blob
from fedsplit.wire.encoded import Encoded, MalformedPacket, check_encoded

ENCODED = Encoded(
    {"codes": np.arange(6, dtype=np.int8).reshape(2, 3), "scales": np.ones(2, np.float32)},
    {"dtype": "float32", "shape": (2, 3), "x": 1.5},
)


def test_an_encoded_tensor_returns_from_its_blob() -> None:
    found = from_blob(to_blob(ENCODED))
    assert found.header == ENCODED.header and found.arrays.keys() == ENCODED.arrays.keys()
    for name, array in ENCODED.arrays.items():
        assert found.arrays[name].dtype == array.dtype and np.array_equal(found.arrays[name], array)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_bytes_are_refused_or_have_the_form_of_an_encoded_tensor(data: st.DataObject) -> None:
    blob = bytearray(to_blob(ENCODED).numpy().tobytes())
    blob[data.draw(st.integers(0, len(blob) - 1))] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(blob)))
    for damaged in (bytes(blob), bytes(blob[:cut]), bytes(blob) + b"more"):
        with contextlib.suppress(MalformedPacket):  # a change in a value stays an encoded tensor
            check_encoded("blob", from_blob(torch.tensor(list(damaged), dtype=torch.uint8)))


@pytest.mark.parametrize("blob", [torch.zeros(3), torch.zeros(2, 3, dtype=torch.uint8)])
def test_other_tensors_are_no_blobs(blob: torch.Tensor) -> None:
    with pytest.raises(MalformedPacket):
        from_blob(blob)
