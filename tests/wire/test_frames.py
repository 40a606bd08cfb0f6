"""Frames on a socket: a packet crosses to the bit, and whatever else comes is an error that is expected."""

from __future__ import annotations

import json
import socket
import struct
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedsplit.trunk.memory import resident_memory
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


def frame_of(packet: Packet) -> bytes:
    """Returns the bytes of a packet's frame."""
    here, there = socket.socketpair()
    with here, there:
        frames.send(here, 7, packet)
        here.shutdown(socket.SHUT_WR)
        return there.makefile("rb").read()


@st.composite
def mutations(draw: st.DrawFn) -> bytes:
    """A valid frame in which bytes are changed, left out, doubled or added."""
    frame = bytearray(frame_of(draw(PACKETS)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(frame)))
        end = min(len(frame), place + draw(st.integers(0, 12)))
        frame[place:end] = draw(st.sampled_from([b"", bytes(frame[place:end]) * 2]) | st.binary(max_size=12))
    return bytes(frame)


@settings(max_examples=100)
@given(mutations() | st.binary(max_size=200))
def test_whatever_bytes_come_only_packets_and_expected_errors_come_out(sent: bytes) -> None:
    here, there = socket.socketpair()
    with here, there:
        here.sendall(sent)
        here.shutdown(socket.SHUT_WR)
        try:
            while True:
                _, came = frames.receive(there)
                if isinstance(came, Packet):
                    check_form(came)
                else:
                    assert isinstance(came, RefusedStep | TrunkFailed)
        except frames.BROKEN:
            pass


@pytest.mark.parametrize(
    "shapes",
    [
        [[2**60]],
        [[2**31, 2**31, 2**31]],
        [[2**62, 2**62]],
        [[2**30]] * 8,
        [[0, 2**63]],
        [[-1, -(2**40)]],
        [[2**31, 1.5]],
    ],
    ids=str,
)
def test_what_a_frame_claims_takes_no_memory(shapes: list[list[Any]]) -> None:
    """A product that would overflow, and several arrays that are too large together, are refused before any is made."""
    arrays_of = {str(number): ["<f8", shape] for number, shape in enumerate(shapes)}
    header = json.dumps({**GOOD, "tensors": {"hidden": {"arrays": arrays_of, "header": {"dtype": "float64"}}}}).encode()
    here, there = socket.socketpair()
    with here, there, pytest.MonkeyPatch.context() as patch, pytest.raises((ValueError, EOFError)):
        if shapes != [[0, 2**63]]:
            patch.setattr(np, "empty", lambda *args: pytest.fail("memory was taken"))
        here.sendall(PREFIX.pack(7, len(header)) + header)
        here.shutdown(socket.SHUT_WR)
        frames.receive(there)


def test_memory_is_used_as_bytes_come_and_not_as_they_are_claimed() -> None:
    shape = [2**28]  # 2 GiB
    tensors = {"hidden": {"arrays": {"values": ["<f8", shape]}, "header": {"dtype": "float64"}}}
    header = json.dumps({**GOOD, "tensors": tensors}).encode()
    here, there = socket.socketpair()
    before = resident_memory()
    with here, there, pytest.raises(EOFError):
        here.sendall(PREFIX.pack(7, len(header)) + header + b"x" * 1000)
        here.shutdown(socket.SHUT_WR)
        frames.receive(there)
    assert resident_memory() - before < 2**28


@pytest.mark.parametrize("length", [2**16 + 1, 2**32 - 1])
def test_a_header_that_claims_to_be_long_is_not_waited_for(length: int) -> None:
    here, there = socket.socketpair()
    with here, there, pytest.raises(ValueError, match="a header is too long"):
        here.sendall(PREFIX.pack(0, length))
        frames.receive(there)


@pytest.mark.parametrize("begun", [PREFIX.pack(7, 100), PREFIX.pack(7, 100) + b"{"])
def test_a_frame_that_stops_halfway_is_given_up(begun: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "LONGEST_PAUSE", 0.01)
    here, there = socket.socketpair()
    with here, there:
        here.sendall(begun)
        with pytest.raises(frames.BROKEN):
            frames.receive(there)
        assert there.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16) == bytes(
            16
        )  # between frames there is no limit


def test_the_framing_is_what_a_socket_carries_beside_the_arrays() -> None:
    key = StepKey(1, 0, 0)
    values = Encoded({"values": np.zeros((2, 3), np.float32)}, {"dtype": "float32", "shape": (2, 3)})
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for sent in (Packet(key, {"hidden": values}), Packet(key, shape=(2, 3, 8)), Packet(key, wait=0.05)):
            frames.send(ours, 7, sent)
            carried = len(theirs.recv(2**16))
            assert carried == frames.framing(sent) + sent.nbytes
            frames.send(ours, 7, sent)
            _, arrived = frames.receive(theirs)
            assert isinstance(arrived, Packet)
            assert frames.framing(arrived) == frames.framing(sent)  # the trunk counts what came over a socket
