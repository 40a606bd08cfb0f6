"""A stream hands on every answer once, in whatever order they come, and every packet gets one when it breaks."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedsplit.wire import frames, sockets
from fedsplit.wire.casting import array_as
from fedsplit.wire.packets import Packet, StepKey
from fedsplit.wire.socket_server import PacketServer
from fedsplit.wire.sockets import Address, PacketClient
from fedsplit.wire.steps import StaleStep
from fedsplit.wire.streams import PacketStream, client_of
from fedsplit.wire.transport import Unanswered

pytestmark = pytest.mark.skipif(not sockets.is_possible(), reason="only Linux has such sockets")

KEY = StepKey(1, 2, 3, run="run")


def packet(step: int, size: int = 1) -> Packet:
    return Packet(replace(KEY, step=step), {"hidden": array_as(np.full(size, step, np.float32), "float32")})


def test_packets_of_many_threads_get_their_own_answers() -> None:
    stream = PacketStream(PacketServer(lambda packet, done: done(packet)).address)
    answers: queue.Queue[tuple[int, Any]] = queue.Queue()

    def send(first: int) -> None:
        for step in range(first, first + 20):
            stream.send(packet(step, 2**16), lambda answer, step=step: answers.put((step, answer)))  # type: ignore[misc]

    threads = [threading.Thread(target=send, args=(100 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(80):
        step, answer = answers.get(timeout=30)
        assert answer.key.step == step and answer.tensors["hidden"].array("values")[-1] == step
    stream.close()


def test_the_packets_of_one_thread_arrive_in_order_and_errors_are_answers() -> None:
    taken: list[int] = []

    def serve(one: Packet, done: Callable[[Packet | Exception], None]) -> None:
        taken.append(one.key.step)
        done(StaleStep("late") if one.key.step == 5 else one)

    stream = PacketStream(PacketServer(serve).address)
    answers: queue.Queue[Any] = queue.Queue()
    for step in range(30):
        stream.send(packet(step), answers.put)
    came = [answers.get(timeout=30) for _ in range(30)]
    assert taken == list(range(30))
    assert [type(answer) for answer in came if isinstance(answer, Exception)] == [StaleStep]
    stream.close()


def test_what_has_no_answer_is_told_so_once_when_the_connection_ends() -> None:
    asked = threading.Event()
    stream = PacketStream(PacketServer(lambda packet, done: asked.set()).address)
    answers: queue.Queue[Any] = queue.Queue()
    stream.send(packet(0), answers.put)
    assert asked.wait(30) and stream.is_open
    stream.close()
    stream.close()
    assert isinstance(answers.get(timeout=30), Unanswered) and not stream.is_open
    stream.send(packet(1), answers.put)
    assert isinstance(answers.get(timeout=30), Unanswered)
    assert answers.empty()


def test_a_server_that_hangs_up_ends_the_wait() -> None:
    address = PacketServer(lambda packet, done: done(packet)).address
    stranger = PacketStream(replace(address, token=b"0" * len(address.token)))  # the server hangs up
    answers: queue.Queue[Any] = queue.Queue()
    stranger.send(packet(0), answers.put)
    assert isinstance(answers.get(timeout=30), Unanswered)


def test_the_caller_goes_on_while_a_packet_is_sent_to_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other machine reads nothing until the caller has gone on."""
    monkeypatch.setattr(sockets, "is_possible", lambda: False)  # as on another machine: there is TCP alone
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = Address("nobody", b"t" * 32, "127.0.0.1", listener.getsockname()[1])
        client = client_of(address)
        there, _ = listener.accept()
        with there:
            answers = [client.send(packet(step, 2**22)) for step in range(2)]  # 16 MiB each: no buffer takes them
            frames.read(there, 32)
            for step in range(2):
                number, came = frames.receive(there)
                assert isinstance(came, Packet) and came.key.step == step
                frames.send(there, number, replace(came, tensors={}, wait=1.0 + step))
            assert [answer().wait for answer in (*answers, answers[0])] == [1.0, 2.0, 1.0]
            lost = client.send(packet(2))
        with pytest.raises(Unanswered):
            lost()
    for _ in range(2):  # whoever asks again finds another way at once
        with pytest.raises(Unanswered):
            client.send(packet(3))
    client.forget()


def test_on_one_machine_packets_need_no_further_thread() -> None:
    client = client_of(PacketServer(lambda packet, done: done(packet), "127.0.0.1").address)
    assert isinstance(client, PacketClient) and client.send(packet(0))().key.step == 0
