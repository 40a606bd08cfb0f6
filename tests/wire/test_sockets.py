"""Packets over a socket: to the bit, to those who know the token alone, and never a wrong answer."""

from __future__ import annotations

import json
import os
import queue
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedsplit.trunk.sessions import FullTrunk
from fedsplit.wire import sockets
from fedsplit.wire.packets import Encoded, Packet, StepKey, check_form
from fedsplit.wire.sockets import Address, PacketClient, PacketServer, TrunkFailed, Unanswered
from fedsplit.wire.steps import RefusedStep, StaleStep

pytestmark = pytest.mark.skipif(not sockets.is_possible(), reason="only Linux has such sockets")

KEY = StepKey(1, 2, 3, run="run")
DTYPES = st.sampled_from([np.float32, np.float16, np.float64, np.int16, np.uint8, np.bool_])
SHAPES = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)
ENCODED = st.builds(
    Encoded, arrays.arrays(DTYPES, SHAPES), st.sampled_from(["float32", "bfloat16"]), st.sampled_from([1.0, 2.0**-7])
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
        assert (encoded.dtype, encoded.scale, encoded.data.dtype, encoded.data.shape) == (
            (came.dtype, came.scale, came.data.dtype, came.data.shape)
        )
        assert encoded.data.tobytes() == came.data.tobytes()
    return True


@given(PACKETS)
def test_a_packet_crosses_to_the_bit(packet: Packet) -> None:
    here, there = socket.socketpair()
    with here, there:
        sockets._send(here, 7, packet)
        number, came = sockets._receive(there)
        assert number == 7
        assert isinstance(came, Packet) and same(packet, came)


@pytest.mark.parametrize("error", [StaleStep("it lies behind"), FullTrunk("no"), MemoryError("none is left")], ids=repr)
def test_what_is_wrong_crosses_with_its_name_and_words(error: Exception) -> None:
    """A refusal is raised as what it is; of anything else only the words come, so that nothing else can be made."""
    here, there = socket.socketpair()
    with here, there:
        sockets._send(here, 8, error)
        number, came = sockets._receive(there)
        assert (number, str(came)) == (8, str(error))
        assert type(came) is (type(error) if isinstance(error, RefusedStep) else TrunkFailed)


def test_what_is_larger_than_the_sockets_memory_crosses_both_ways_at_once() -> None:
    """Neither side may wait for the other to read before it reads itself."""
    large = Packet(KEY, {"hidden": Encoded(np.random.default_rng(0).random(2**21), "float64")})
    server = PacketServer(lambda packet, done: done(packet))
    client = PacketClient(server.address)
    answers = [client.send(replace(large, key=replace(KEY, step=step))) for step in range(3)]
    for step in (2, 0, 1):  # answers are found whatever the order in which they are asked for
        assert same(replace(large, key=replace(KEY, step=step)), answers[step]())
    assert server.taken == 3
    client.close()


def test_an_answer_may_come_late_and_out_of_order() -> None:
    waiting: queue.Queue[tuple[Packet, Callable[[Packet | Exception], None]]] = queue.Queue()
    client = PacketClient(PacketServer(lambda packet, done: waiting.put((packet, done))).address)
    first, second = client.send(Packet(KEY)), client.send(Packet(replace(KEY, step=9)))
    (one, answer_one), (two, answer_two) = waiting.get(timeout=10), waiting.get(timeout=10)
    answer_two(replace(two, wait=0.5))
    answer_one(one)
    assert first() == Packet(KEY)
    assert second().wait == 0.5
    client.close()


def test_what_the_server_raises_is_raised_at_the_client_which_goes_on() -> None:
    def serve(packet: Packet, done: Callable[[Packet | Exception], None]) -> None:
        done(StaleStep("it lies behind") if packet.key.step else packet)

    client = PacketClient(PacketServer(serve).address)
    refused = client.send(Packet(replace(KEY, step=1)))
    for _ in range(2):
        with pytest.raises(StaleStep, match="it lies behind"):
            refused()
    answer = client.send(Packet(replace(KEY, step=0)))
    assert answer() == Packet(replace(KEY, step=0))
    assert answer() is answer()  # as often as it is asked for
    client.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_answer_that_cannot_be_sent_is_seen_to_be_lost() -> None:
    server = PacketServer(lambda packet, done: done(replace(packet, wait=object())))  # type: ignore[arg-type]
    client = PacketClient(server.address)
    answer = client.send(Packet(KEY))
    with pytest.raises(Unanswered):
        answer()


def test_nothing_of_a_packet_is_kept_while_the_next_one_is_waited_for() -> None:
    kept: list[weakref.ref[np.ndarray]] = []

    def serve(packet: Packet, done: Callable[[Packet | Exception], None]) -> None:
        answer = Packet(packet.key, {"hidden": Encoded(np.ones(9), "float64")})
        kept.extend(weakref.ref(p.tensors["hidden"].data) for p in (packet, answer))
        done(answer)

    client = PacketClient(PacketServer(serve).address)
    client.send(Packet(KEY, {"hidden": Encoded(np.zeros(9), "float64")}))()
    until = time.monotonic() + 10
    while any(reference() is not None for reference in kept) and time.monotonic() < until:
        time.sleep(0.01)
    assert [reference() for reference in kept] == [None, None]
    client.close()


def test_other_users_are_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    server = PacketServer(lambda packet, done: done(packet))
    monkeypatch.setattr(sockets, "_user_of", lambda connection: os.geteuid() + 1)
    with pytest.raises((Unanswered, OSError)):
        PacketClient(server.address).send(Packet(KEY))()
    assert server.taken == 0


def test_answers_that_nobody_wants_any_more_are_dropped() -> None:
    client = PacketClient(PacketServer(lambda packet, done: done(packet)).address)
    unwanted = [client.send(Packet(KEY)) for _ in range(3)]
    client.forget()
    with pytest.raises(Unanswered):
        unwanted[0]()
    assert client.send(Packet(replace(KEY, step=9)))().key.step == 9
    assert not client._came
    client.close()


def test_without_the_token_nothing_is_taken() -> None:
    server = PacketServer(lambda packet, done: done(packet))
    stranger = PacketClient(Address(server.address.name, b"x" * 32))
    with pytest.raises(Unanswered):
        stranger.send(Packet(KEY))()
    assert not stranger.is_open
    with pytest.raises(Unanswered, match="closed"):
        stranger.send(Packet(KEY))
    assert server.taken == 0


def test_nobody_listens_elsewhere() -> None:
    with pytest.raises(OSError, match="refused"):
        PacketClient(Address("fedsplit-nobody", b""))


PREFIX = struct.Struct("<QI")
OBJECTS = (
    b'{"key": {"round": 1, "client": 0, "step": 0}, "shape": [], "tensors": {"hidden": ["|O", [1], "float32", 1.0]}}'
)
HUGE = OBJECTS.replace(b"|O", b"<f8").replace(b"[1]", b"[9999999999]")
UNKNOWN = b'{"key": {"rounds": 1}, "shape": [], "tensors": {}}'


@pytest.mark.parametrize(
    "frame",
    [
        PREFIX.pack(0, 2**20),
        PREFIX.pack(0, 3) + b"{no",
        *(PREFIX.pack(0, len(header)) + header for header in (OBJECTS, HUGE, UNKNOWN, b"[]", b"{}", b"\xff")),
        PREFIX.pack(0, 9)[:5],
    ],
    ids=["long", "no json", "objects", "huge", "unknown", "a list", "empty", "no text", "torn"],
)
def test_who_sends_no_frame_is_hung_up_on_and_the_others_are_served(frame: bytes) -> None:
    server = PacketServer(lambda packet, done: done(packet))
    good = PacketClient(server.address)
    with socket.socket(socket.AF_UNIX) as bad:
        bad.settimeout(10)
        bad.connect("\0" + server.address.name)
        bad.sendall(server.address.token + frame)
        bad.shutdown(socket.SHUT_WR)
        assert bad.recv(1) == b""
    assert good.send(Packet(KEY))() == Packet(KEY)
    assert server.taken == 1
    good.close()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ARRAY = st.tuples(
    st.sampled_from(["<f4", "|b1", ">f4", "<f16", "<c8", "O", "<M8[s]"]) | JSON,
    st.lists(st.integers(-2, 4), max_size=4) | JSON,
    st.sampled_from(["float32", "nn"]) | JSON,
    st.just(1.0) | JSON,
).map(list)
GOOD = {**sockets._header(Packet(KEY)), "tensors": {"hidden": ["<f4", [2], "float32", 1.0]}}
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
        header["tensors"][draw(st.text(max_size=5))] = draw(ARRAY | JSON)
    elif where == "array":
        header["tensors"]["hidden"] = draw(ARRAY)
    return json.dumps(draw(JSON) if where == "all" else header).encode()


@given(headers(), st.binary(max_size=40))
def test_whatever_a_frame_says_only_packets_come_out_of_it(header: bytes, rest: bytes) -> None:
    """Each of its fields has its type; anything else is an error that the connection's thread expects."""
    here, there = socket.socketpair()
    with here, there:
        here.sendall(PREFIX.pack(7, len(header)) + header + rest)
        here.shutdown(socket.SHUT_WR)
        try:
            number, came = sockets._receive(there)
        except sockets._BROKEN:
            return
    assert number == 7
    if isinstance(came, Packet):
        check_form(came)
        assert hash(came.key) is not None and came.nbytes >= 0


def test_a_frame_nested_too_deep_is_no_frame() -> None:
    deep = b"[" * 60000
    here, there = socket.socketpair()
    with here, there, pytest.raises(sockets._BROKEN):
        here.sendall(PREFIX.pack(0, len(deep)) + deep)
        sockets._receive(there)


def test_no_more_is_read_from_a_client_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has asked for stays bounded; others are served meanwhile, and it may go on as soon as it reads."""
    monkeypatch.setattr(sockets, "MOST_UNREAD", 5)
    answer = Encoded(np.zeros(2**17), "float64")  # more than a socket's memory
    served = queue.SimpleQueue[int]()

    def serve(packet: Packet, done: Callable[[Packet | Exception], None]) -> None:
        served.put(packet.key.step)
        done(Packet(packet.key, {"hidden": answer}))

    server = PacketServer(serve)
    with socket.socket(socket.AF_UNIX) as rude:
        rude.connect("\0" + server.address.name)
        rude.sendall(server.address.token)
        for step in range(30):
            sockets._send(rude, step, Packet(replace(KEY, step=step)))
        assert [served.get(timeout=10) for _ in range(5)] == [0, 1, 2, 3, 4]
        other = PacketClient(server.address)
        for step in range(100, 108):
            assert other.send(Packet(replace(KEY, step=step)))().key.step == step
            assert served.get(timeout=10) == step  # and not the sixth of the rude one
        assert served.empty()
        for step in range(30):
            assert sockets._receive(rude)[0] == step
        assert [served.get(timeout=10) for _ in range(25)] == list(range(5, 30))
    other.close()


def test_bytes_that_are_unread_are_bounded_and_two_packets_always_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two micro-batches are under way at once, however large."""
    monkeypatch.setattr(sockets, "MOST_UNREAD_BYTES", 100)
    outbox = sockets._Outbox()
    first = outbox.take(1000)
    assert outbox._has_room()
    second = outbox.take(1000)
    assert not outbox._has_room()
    outbox.put(first, 0, StaleStep("no"))
    assert not outbox._has_room()
    outbox.put(second, 1, Packet(KEY, {"hidden": Encoded(np.zeros(9), "float64")}))
    assert outbox._has_room()
    outbox.put(outbox.take(0), 2, Packet(KEY, {"hidden": Encoded(np.zeros(100), "float64")}))
    assert not outbox._has_room()
    outbox.sent(first)
    outbox.sent(second)
    assert outbox._has_room() and outbox.wait_for_room()
    outbox.take(1000)
    outbox.close()
    assert not outbox.wait_for_room()


def test_a_client_that_sends_much_before_it_reads_is_not_held_up_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server reads no further before answers are read; the client reads them where it cannot send."""
    monkeypatch.setattr(sockets, "MOST_UNREAD", 1)
    large = Packet(KEY, {"hidden": Encoded(np.random.default_rng(0).random(2**17), "float64")})
    client = PacketClient(PacketServer(lambda packet, done: done(packet)).address)
    answers = [client.send(replace(large, key=replace(KEY, step=step))) for step in range(8)]
    for step, answer in enumerate(answers):
        assert same(replace(large, key=replace(KEY, step=step)), answer())
    client.close()


def test_a_client_that_is_gone_leaves_no_thread_behind() -> None:
    before = threading.active_count()
    server = PacketServer(lambda packet, done: done(packet))
    for _ in range(5):
        client = PacketClient(server.address)
        client.send(Packet(KEY))()
        client.close()
    until = time.monotonic() + 10
    while threading.active_count() > before + 1 and time.monotonic() < until:  # the one that listens stays
        time.sleep(0.01)
    assert threading.active_count() <= before + 1


def test_whoever_is_interrupted_in_the_middle_of_an_answer_hangs_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of the answer would be taken for the next one."""
    client = PacketClient(PacketServer(lambda packet, done: done(packet)).address)
    answer = client.send(Packet(KEY))

    def interrupted(connection: socket.socket) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sockets, "_receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answer()
    assert not client.is_open
