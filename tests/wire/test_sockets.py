"""Packets over a socket: to those who know the token alone, and never a wrong answer."""

from __future__ import annotations

import queue
import socket
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from fedsplit.wire import frames, socket_server, sockets
from fedsplit.wire.casting import array_as
from fedsplit.wire.packets import Packet, StepKey
from fedsplit.wire.socket_server import PacketServer
from fedsplit.wire.sockets import Address, PacketClient
from fedsplit.wire.steps import StaleStep
from fedsplit.wire.transport import Unanswered

pytestmark = pytest.mark.skipif(not sockets.is_possible(), reason="only Linux has such sockets")

KEY = StepKey(1, 2, 3, run="run")


def same(one: Packet, other: Packet) -> bool:
    """Whether two packets with an array each are the same."""
    values = [packet.tensors["hidden"].array("values").tobytes() for packet in (one, other)]
    return replace(one, tensors={}) == replace(other, tensors={}) and values[0] == values[1]


def test_what_is_larger_than_the_sockets_memory_crosses_both_ways_at_once() -> None:
    """Neither side may wait for the other to read before it reads itself."""
    large = Packet(KEY, {"hidden": array_as(np.random.default_rng(0).random(2**21), "float64")})
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


def test_answers_that_nobody_wants_any_more_are_dropped() -> None:
    client = PacketClient(PacketServer(lambda packet, done: done(packet)).address)
    unwanted = [client.send(Packet(KEY)) for _ in range(3)]
    client.forget()
    with pytest.raises(Unanswered):
        unwanted[0]()
    assert client.send(Packet(replace(KEY, step=9)))().key.step == 9
    assert not client._came
    client.close()


def test_nobody_listens_elsewhere() -> None:
    with pytest.raises(OSError, match="refused"):
        PacketClient(Address("fedsplit-nobody", b""))


def test_a_client_that_sends_much_before_it_reads_is_not_held_up_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server reads no further before answers are read; the client reads them where it cannot send."""
    monkeypatch.setattr(socket_server, "MOST_UNREAD", 1)
    large = Packet(KEY, {"hidden": array_as(np.random.default_rng(0).random(2**17), "float64")})
    client = PacketClient(PacketServer(lambda packet, done: done(packet)).address)
    answers = [client.send(replace(large, key=replace(KEY, step=step))) for step in range(8)]
    for step, answer in enumerate(answers):
        assert same(replace(large, key=replace(KEY, step=step)), answer())
    client.close()


def test_whoever_is_interrupted_in_the_middle_of_an_answer_hangs_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of the answer would be taken for the next one."""
    client = PacketClient(PacketServer(lambda packet, done: done(packet)).address)
    answer = client.send(Packet(KEY))

    def interrupted(connection: socket.socket) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(frames, "receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answer()
    assert not client.is_open


def test_another_machine_comes_by_tcp_with_the_same_token() -> None:
    server = PacketServer(lambda packet, done: done(packet), "127.0.0.1")
    assert (server.address.host, server.address.port > 0) == ("127.0.0.1", True)
    elsewhere = replace(server.address, name="a name of another machine")
    large = Packet(KEY, {"hidden": array_as(np.random.default_rng(0).random(2**21), "float64")})
    client = PacketClient(elsewhere)
    answers = [client.send(large) for _ in range(3)]
    assert all(same(large, answer()) for answer in answers)
    assert client._connection.family == socket.AF_INET
    client.close()

    stranger = PacketClient(replace(elsewhere, token=b"0" * 32))
    with pytest.raises(Unanswered):
        stranger.send(Packet(KEY))()


def test_on_the_same_machine_a_server_with_both_is_reached_without_tcp() -> None:
    client = PacketClient(PacketServer(lambda packet, done: done(packet), "127.0.0.1").address)
    assert client._connection.family == socket.AF_UNIX
    assert client.send(Packet(KEY))() == Packet(KEY)
    client.close()
