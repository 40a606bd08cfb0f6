"""The codecs raw and bf16: what comes out is what went in, and the bytes are those of the data."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedsplit.wire.casting import array_as
from fedsplit.wire.codecs import Role, make_codec
from fedsplit.wire.encoded import Encoded, MalformedPacket, check_encoded
from fedsplit.wire.packets import StepKey


def gradient_in(hidden: torch.dtype) -> Role:
    """Role of a gradient by hidden states of that type."""
    return Role("gradient", "up", StepKey(1, 0, 0), dtype=hidden)


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES)
def test_raw_returns_the_same_bits(dtype: torch.dtype) -> None:
    tensor = (torch.randn(3, 4, 5) * 100).to(dtype)
    encoded = make_codec("raw").encode(tensor.transpose(0, 2))
    decoded = make_codec("raw").decode(pickle.loads(pickle.dumps(encoded)))
    assert decoded.dtype == dtype
    assert torch.equal(decoded, tensor.transpose(0, 2))
    assert encoded.nbytes == tensor.nbytes


@given(st.floats(-(2.0**100), 2.0**100, width=32))
def test_bf16_rounds_to_eight_bits(value: float) -> None:
    codec = make_codec("bf16")
    encoded = codec.encode(torch.tensor([value]))
    decoded = codec.decode(encoded)
    assert (encoded.nbytes, decoded.dtype) == (2, torch.float32)
    # Beside the relative error of the format: below its smallest normal number the error is absolute.
    assert abs(float(decoded) - value) <= max(abs(value) * 2**-8, 2**-126)


def test_bf16_leaves_masks_alone() -> None:
    mask = torch.tensor([[True, False]])
    assert torch.equal(make_codec("bf16").decode(make_codec("bf16").encode(mask)), mask)


def test_what_arrives_is_not_copied() -> None:
    """Arrays out of an object store are read-only; nothing is said about it, and nothing is copied."""
    sent = make_codec("raw").encode(torch.ones(2))
    values = sent.array("values")
    arrived = array_as(np.frombuffer(values.tobytes(), values.dtype), sent.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = make_codec("raw").decode(arrived)
    assert decoded.data_ptr() == arrived.array("values").ctypes.data


def test_encoding_takes_no_gradient_along() -> None:
    encoded = make_codec("raw").encode(torch.ones(2, requires_grad=True) * 2)
    assert not make_codec("raw").decode(encoded).requires_grad


@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_a_gradient_of_float16_crosses_in_its_bytes_whatever_its_size(size: float) -> None:
    codec, gradient = make_codec("raw"), torch.tensor([[size, -size / 3, size / 4096, 0.0]])
    encoded = codec.encode(gradient, gradient_in(torch.float16))
    decoded = codec.decode(pickle.loads(pickle.dumps(encoded)))
    assert (encoded.nbytes, decoded.dtype) == (2 * 4, torch.float32)
    assert torch.allclose(decoded, gradient, rtol=2**-11, atol=0)


def test_a_gradient_that_is_not_finite_stays_so() -> None:
    for value in (torch.inf, torch.nan):
        encoded = make_codec("raw").encode(torch.tensor([1.0, value]), gradient_in(torch.float16))
        assert not torch.isfinite(make_codec("raw").decode(encoded)).all()


def test_gradients_of_other_types_cross_as_they_are() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        gradient = torch.randn(3).to(dtype)
        encoded = make_codec("raw").encode(gradient, gradient_in(dtype))
        assert "scale" not in encoded.header
        assert torch.equal(make_codec("raw").decode(encoded), gradient)


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (np.zeros(2, np.int64), "float32"),
        (np.zeros(2, np.float64), "float32"),
        (np.zeros(2, np.float32), "int64"),
        (np.zeros(2, np.float32), "bool"),
        (np.zeros(2, np.float32), "nn"),
        (np.zeros(2, np.float32), "no type at all"),
    ],
    ids=str,
)
def test_what_no_encoder_makes_is_not_cast(array: np.ndarray, dtype: str) -> None:
    with pytest.raises(MalformedPacket, match="cannot stand for values of type"):
        make_codec("raw").decode(array_as(array, dtype))


@pytest.mark.parametrize("scale", [0.0, -1.0, np.inf, np.nan, 1])
def test_a_scale_that_is_no_number_above_zero_is_refused(scale: float) -> None:
    with pytest.raises(MalformedPacket, match="scale"):
        make_codec("raw").decode(Encoded({"values": np.ones(2, np.float16)}, {"dtype": "float32", "scale": scale}))


ARRAYS = arrays.arrays(
    st.sampled_from(["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "?"]), arrays.array_shapes(min_dims=0, min_side=0)
)
FACTS = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(max_size=9)
NAMES = st.sampled_from(["float32", "float16", "bfloat16", "int64", "bool", "dtype", "nn", "load", "complex64", ""])


@settings(max_examples=100)
@given(
    st.dictionaries(st.sampled_from(["values", "more"]), ARRAYS, max_size=2),
    st.dictionaries(st.sampled_from(["scale", "dtype", "x"]), FACTS | NAMES, max_size=3),
    st.sampled_from(["raw", "bf16"]),
)
def test_whatever_is_encoded_a_tensor_comes_out_or_a_refusal(
    values: dict[str, np.ndarray], header: dict[str, Any], codec: str
) -> None:
    encoded = Encoded(values, header)
    try:
        check_encoded("hidden", encoded)
        decoded = make_codec(codec).decode(encoded, gradient_in(torch.float32))
    except MalformedPacket:
        return
    assert decoded.shape == values["values"].shape and str(decoded.dtype) == f"torch.{header['dtype']}"
