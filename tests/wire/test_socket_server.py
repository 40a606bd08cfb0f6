"""A server of packets: hangs up on those without the token and without manners, and bounds what is on the way."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.wire import frames, socket_server, sockets
from fedsplit.wire.casting import array_as
from fedsplit.wire.packets import Packet, StepKey
from fedsplit.wire.socket_server import PacketServer
from fedsplit.wire.sockets import Address, PacketClient
from fedsplit.wire.steps import StaleStep
from fedsplit.wire.transport import FallbackTransport, PendingAnswer, TrunkLost, Unanswered

pytestmark = pytest.mark.skipif(not sockets.is_possible(), reason="only Linux has such sockets")

KEY = StepKey(1, 2, 3, run="run")


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
        answer = Packet(packet.key, {"hidden": array_as(np.ones(9), "float64")})
        kept.extend(weakref.ref(p.tensors["hidden"].array("values")) for p in (packet, answer))
        done(answer)

    client = PacketClient(PacketServer(serve).address)
    client.send(Packet(KEY, {"hidden": array_as(np.zeros(9), "float64")}))()
    until = time.monotonic() + 10
    while any(reference() is not None for reference in kept) and time.monotonic() < until:
        time.sleep(0.01)
    assert [reference() for reference in kept] == [None, None]
    client.close()


def test_other_users_are_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    server = PacketServer(lambda packet, done: done(packet))
    monkeypatch.setattr(socket_server, "_user_of", lambda connection: os.geteuid() + 1)
    with pytest.raises((Unanswered, OSError)):
        PacketClient(server.address).send(Packet(KEY))()
    assert server.taken == 0


def test_without_the_token_nothing_is_taken() -> None:
    server = PacketServer(lambda packet, done: done(packet))
    stranger = PacketClient(Address(server.address.name, b"x" * 32))
    with pytest.raises(Unanswered):
        stranger.send(Packet(KEY))()
    assert not stranger.is_open
    with pytest.raises(TrunkLost, match="closed"):  # as by every other door
        stranger.send(Packet(KEY))
    assert server.taken == 0


PREFIX = struct.Struct("<QI")
OBJECTS = (
    b'{"key": {"round": 1, "client": 0, "step": 0}, "shape": [], '
    b'"tensors": {"hidden": {"arrays": {"values": ["|O", [1]]}, "header": {"dtype": "float32"}}}}'
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


def test_no_more_is_read_from_a_client_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has asked for stays bounded; others are served meanwhile, and it may go on as soon as it reads."""
    monkeypatch.setattr(socket_server, "MOST_UNREAD", 5)
    answer = array_as(np.zeros(2**17), "float64")  # more than a socket's memory
    served = queue.SimpleQueue[int]()

    def serve(packet: Packet, done: Callable[[Packet | Exception], None]) -> None:
        served.put(packet.key.step)
        done(Packet(packet.key, {"hidden": answer}))

    server = PacketServer(serve)
    with socket.socket(socket.AF_UNIX) as rude:
        rude.connect("\0" + server.address.name)
        rude.sendall(server.address.token)
        for step in range(30):
            frames.send(rude, step, Packet(replace(KEY, step=step)))
        assert [served.get(timeout=10) for _ in range(5)] == [0, 1, 2, 3, 4]
        other = PacketClient(server.address)
        for step in range(100, 108):
            assert other.send(Packet(replace(KEY, step=step)))().key.step == step
            assert served.get(timeout=10) == step  # and not the sixth of the rude one
        assert served.empty()
        for step in range(30):
            assert frames.receive(rude)[0] == step
        assert [served.get(timeout=10) for _ in range(25)] == list(range(5, 30))
    other.close()


def test_bytes_that_are_unread_are_bounded_and_two_packets_always_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two micro-batches are under way at once, however large."""
    monkeypatch.setattr(socket_server, "MOST_UNREAD_BYTES", 100)
    outbox = socket_server._Outbox()
    first = outbox.take(1000)
    assert outbox._has_room()
    second = outbox.take(1000)
    assert not outbox._has_room()
    outbox.put(first, 0, StaleStep("no"))
    assert not outbox._has_room()
    outbox.put(second, 1, Packet(KEY, {"hidden": array_as(np.zeros(9), "float64")}))
    assert outbox._has_room()
    outbox.put(outbox.take(0), 2, Packet(KEY, {"hidden": array_as(np.zeros(100), "float64")}))
    assert not outbox._has_room()
    outbox.sent(first)
    outbox.sent(second)
    assert outbox._has_room() and outbox.wait_for_room()
    outbox.take(1000)
    outbox.close()
    assert not outbox.wait_for_room()


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


@pytest.fixture(scope="module")
def echo() -> PacketServer:
    return PacketServer(lambda packet, done: done(packet))


@settings(max_examples=50)
@given(knows_token=st.booleans(), sent=st.binary(max_size=300))
def test_whatever_a_connection_sends_the_others_are_served(echo: PacketServer, knows_token: bool, sent: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect("\0" + echo.address.name)
        stranger.sendall((echo.address.token if knows_token else b"") + sent)
        stranger.shutdown(socket.SHUT_WR)
        client = PacketClient(echo.address)
        assert client.send(Packet(KEY))() == Packet(KEY)
        client.close()
        stranger.settimeout(60)
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(1) == b""  # the server hangs up, and sends nothing


def test_one_connection_too_many_is_told_so_and_its_packets_go_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket_server, "MOST_CONNECTIONS", 2)
    server = PacketServer(lambda packet, done: done(packet))
    clients = [PacketClient(server.address) for _ in range(2)]
    for client in clients:
        assert client.send(Packet(KEY))() == Packet(KEY)

    class Elsewhere:
        def send(self, packet: Packet) -> PendingAnswer:
            return lambda: replace(packet, wait=0.5)

        def forget(self) -> None:
            """Has nothing to forget."""

    one_too_many = PacketClient(server.address)
    refusal = frames.receive(one_too_many._connection)[1]
    assert isinstance(refusal, Unanswered) and str(refusal) == "the trunk has 2 connections, and takes no more"
    with pytest.raises(Unanswered):
        one_too_many.send(Packet(KEY))()
    further = FallbackTransport(PacketClient(server.address), Elsewhere())
    assert further.send(Packet(KEY))().wait == 0.5
    assert server.taken == 2

    clients[0].close()
    until = time.monotonic() + 10
    answer = Packet(KEY, wait=0.5)
    while answer.wait and time.monotonic() < until:  # until the server has seen that a place is free
        answer = FallbackTransport(PacketClient(server.address), Elsewhere()).send(Packet(KEY))()
    assert answer == Packet(KEY)
    clients[1].close()


def test_strangers_take_only_so_many_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """One connection too many without the token is closed at once; a place is free again where one goes."""
    monkeypatch.setattr(socket_server, "_MOST_STRANGERS", 2)
    server = PacketServer(lambda packet, done: done(packet))

    def connect() -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(20)
        connection.connect("\0" + server.address.name)
        return connection

    first, second, third = (connect() for _ in range(3))
    assert third.recv(1) == b""
    second.close()
    client = None
    while client is None:  # until the server has seen that it is gone
        try:
            client = PacketClient(server.address)
            assert client.send(Packet(KEY))() == Packet(KEY)
        except (OSError, TrunkLost):
            client = None
    client.close()
    first.close()
    third.close()


def test_a_private_server_has_no_port() -> None:
    address = PacketServer(lambda packet, done: done(packet)).address
    assert (address.host, address.port) == ("", 0)
