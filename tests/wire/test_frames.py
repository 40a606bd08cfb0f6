"""Frames on a socket: a packet crosses to the bit, and whatever else comes is an error that is expected."""

from __future__ import annotations

import json
import socket
import struct
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedsplit.trunk.sessions import FullTrunk
from fedsplit.wire import frames, sockets
from fedsplit.wire.encoded import Encoded
from fedsplit.wire.frames import TrunkFailed
from fedsplit.wire.packets import Packet, StepKey, check_form
from fedsplit.wire.steps import RefusedStep, StaleStep

pytestmark = pytest.mark.skipif(not sockets.is_possible(), reason="only Linux has such sockets")

KEY = StepKey(1, 2, 3, run="run")
PREFIX = struct.Struct("<QI")
DTYPES = st.sampled_from([np.float32, np.float16, np.float64, np.int16, np.uint8, np.bool_])
SHAPES = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)
TEXTS = st.text(max_size=9)
FACTS = st.booleans() | st.integers(-9, 2**62) | st.floats(allow_nan=False) | TEXTS | st.tuples(st.integers(0, 9))
HEADERS = st.dictionaries(TEXTS, FACTS, max_size=5)
ENCODED = st.builds(
    lambda values, header, dtype: Encoded(values, {**header, "dtype": dtype}),
    st.dictionaries(TEXTS, arrays.arrays(DTYPES, SHAPES), max_size=3),
    HEADERS,
    st.sampled_from(["float32", "bfloat16"]),
)
KEYS = st.builds(StepKey, *[st.integers(0, 2**40)] * 5, run=st.text(), batch=st.integers(0, 9), session=st.text())
PACKETS = st.builds(
    Packet,
    KEYS,
    st.dictionaries(st.sampled_from(["hidden", "gradient", "mask", "norm"]), ENCODED),
    training=st.booleans(),
    wants_gradient=st.booleans(),
    micros=st.integers(1, 9),
    incarnation=st.text(),
    shape=st.tuples(*[st.integers(0, 99)] * 3),
    wait=st.floats(0, 9),
    batches=st.integers(1, 9),
    rate=st.floats(0, 1),
)


def same(one: Packet, other: Packet) -> bool:
    assert replace(one, tensors={}) == replace(other, tensors={})
    assert one.tensors.keys() == other.tensors.keys()
    for name, encoded in one.tensors.items():
        came = other.tensors[name]
        assert encoded.header == came.header
        assert {n: (a.dtype, a.shape, a.tobytes()) for n, a in encoded.arrays.items()} == {
            n: (a.dtype, a.shape, a.tobytes()) for n, a in came.arrays.items()
        }
    return True


@given(PACKETS)
def test_a_packet_crosses_to_the_bit(packet: Packet) -> None:
    here, there = socket.socketpair()
    with here, there:
        frames.send(here, 7, packet)
        number, came = frames.receive(there)
        assert number == 7
        assert isinstance(came, Packet) and same(packet, came)


@pytest.mark.parametrize("error", [StaleStep("it lies behind"), FullTrunk("no"), MemoryError("none is left")], ids=repr)
def test_what_is_wrong_crosses_with_its_name_and_words(error: Exception) -> None:
    """A refusal is raised as what it is; of anything else only the words come, so that nothing else can be made."""
    here, there = socket.socketpair()
    with here, there:
        frames.send(here, 8, error)
        number, came = frames.receive(there)
        assert (number, str(came)) == (8, str(error))
        assert type(came) is (type(error) if isinstance(error, RefusedStep) else TrunkFailed)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ARRAY = st.tuples(
    st.sampled_from(["<f4", "|b1", ">f4", "<f16", "<c8", "O", "<M8[s]"]) | JSON,
    st.lists(st.integers(-2, 4), max_size=4) | JSON,
).map(list)
TENSOR = st.fixed_dictionaries(
    {"arrays": st.dictionaries(TEXTS, ARRAY | JSON, max_size=2) | JSON, "header": HEADERS | JSON}
)
GOOD = {**frames.header_of(Packet(KEY)), "tensors": {"hidden": {"arrays": {"values": ["<f4", [2]]}, "header": {}}}}
WRONG = st.sampled_from(["key", "tensors", *(field.name for field in fields(Packet)), "error", "words", "more"])


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A header of which something is odd: a field of the packet, of its key, of an array, or all of it."""
    header: dict[str, Any] = {**GOOD, "key": dict(GOOD["key"]), "tensors": dict(GOOD["tensors"])}
    where = draw(st.sampled_from(["packet", "key", "tensors", "array", "all"]))
    if where == "packet":
        header[draw(WRONG)] = draw(JSON)
    elif where == "key":
        header["key"][draw(st.sampled_from([field.name for field in fields(StepKey)]))] = draw(JSON)
    elif where == "tensors":
        header["tensors"][draw(st.text(max_size=5))] = draw(TENSOR | JSON)
    elif where == "array":
        header["tensors"]["hidden"] = draw(TENSOR)
    return json.dumps(draw(JSON) if where == "all" else header).encode()


@given(headers(), st.binary(max_size=40))
def test_whatever_a_frame_says_only_packets_come_out_of_it(header: bytes, rest: bytes) -> None:
    """Each of its fields has its type; anything else is an error that the connection's thread expects."""
    here, there = socket.socketpair()
    with here, there:
        here.sendall(PREFIX.pack(7, len(header)) + header + rest)
        here.shutdown(socket.SHUT_WR)
        try:
            number, came = frames.receive(there)
        except frames.BROKEN:
            return
    assert number == 7
    if isinstance(came, Packet):
        check_form(came)
        assert hash(came.key) is not None and came.nbytes >= 0


def test_a_frame_nested_too_deep_is_no_frame() -> None:
    deep = b"[" * 60000
    here, there = socket.socketpair()
    with here, there, pytest.raises(frames.BROKEN):
        here.sendall(PREFIX.pack(0, len(deep)) + deep)
        frames.receive(there)
