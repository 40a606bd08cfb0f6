"""A relay passes packets on without waiting, keeps each client's order, and tells of what is lost."""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from test_local import RAW, config_of, packet

from fedsplit.trunk import relay as relays
from fedsplit.trunk.local import LocalTrunk, load_trunks
from fedsplit.trunk.relay import Relay
from fedsplit.trunk.service import load_service
from fedsplit.trunk.spans import spans_of
from fedsplit.trunk.workers import outcome
from fedsplit.wire import sockets
from fedsplit.wire.packets import Packet
from fedsplit.wire.socket_server import PacketServer
from fedsplit.wire.sockets import PacketClient
from fedsplit.wire.streams import PacketStream
from fedsplit.wire.transport import Unanswered

pytestmark = pytest.mark.skipif(not sockets.is_possible(), reason="only Linux has such sockets")


def test_stages_in_a_row_of_sockets_give_what_stages_in_one_thread_give(tiny_models: dict[str, Path]) -> None:
    config = config_of(tiny_models, cut="0:2", trunk__stages="0:1:2", trunk__schedule="copies", lora__dropout=0.3)
    lower, upper = (load_service(config, "run", "first", span=span) for span in spans_of(config))
    for service in (lower, upper):

        def work(service: Any = service) -> None:
            while True:
                service.work()

        threading.Thread(target=work, daemon=True).start()
    address = PacketServer(upper.submit).address
    relay = Relay(lower.submit, lambda: PacketStream(address), learns=True)
    client = PacketClient(PacketServer(relay.submit).address)
    (stages,) = load_trunks(config, "run", "first")
    for step in range(3):
        for what in ("hidden", "gradient"):
            there, here = client.send(packet(1, what, step))(), stages[0].send(packet(1, what, step))()
            assert torch.equal(RAW.decode(there.tensors[what]), RAW.decode(here.tensors[what]))
            assert there.tensors.keys() == here.tensors.keys() == {what}
    relay.close()
    assert client.send(packet(1, "hidden", 3))().tensors  # by a new connection


def relay_to(serve: Any) -> Relay:
    """A relay whose own blocks echo, before a stage that is given."""
    address = PacketServer(serve).address
    return Relay(lambda packet, done: done(packet), lambda: PacketStream(address), learns=True)


def test_a_stage_that_is_lost_is_an_error_and_the_next_packet_finds_a_new_connection() -> None:
    taken: queue.Queue[Packet] = queue.Queue()
    answered = iter((False, True))

    def serve(one: Packet, done: Any) -> None:
        taken.put(one)
        if next(answered):
            done(one)

    relay = relay_to(serve)
    answers: queue.Queue[Any] = queue.Queue()
    relay.submit(packet(0), answers.put)
    assert taken.get(timeout=30)
    relay._streams[0].close()
    assert isinstance(answers.get(timeout=30), Unanswered)
    relay.submit(packet(0), answers.put)
    assert isinstance(answers.get(timeout=30), Packet)
    relay.close()


def test_a_stage_that_cannot_be_reached_is_an_answer() -> None:
    def connect() -> PacketStream:
        raise ConnectionRefusedError("nobody is there")

    answers: list[Any] = []
    Relay(lambda packet, done: done(packet), connect, learns=True).submit(packet(0), answers.append)
    assert "nobody is there" in str(answers[0]) and isinstance(answers[0], OSError)


def test_a_refusal_of_the_own_blocks_does_not_reach_the_rest() -> None:
    refusal = ZeroDivisionError("no")
    answers: list[Any] = []
    Relay(lambda packet, done: done(refusal), lambda: pytest.fail("asked"), learns=True).submit(
        packet(0), answers.append
    )
    assert answers == [refusal]


def test_so_many_clients_have_no_more_connections_than_a_server_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relays, "MOST_STREAMS", 2)
    relay = relay_to(lambda packet, done: done(packet))
    answers: queue.Queue[Any] = queue.Queue()
    for client in range(5):
        relay.submit(packet(client), answers.put)
    assert {answers.get(timeout=30).key.client for _ in range(5)} == set(range(5))
    assert len(relay._streams) == 2
    relay.close()


def test_each_client_has_a_connection_of_its_own() -> None:
    waiting: queue.Queue[Any] = queue.Queue()
    relay = relay_to(lambda packet, done: waiting.put((packet, done)))
    answers: queue.Queue[Any] = queue.Queue()
    for client in (0, 1):
        relay.submit(packet(client), answers.put)
    (one, done_one), (other, done_other) = sorted(
        [waiting.get(timeout=30) for _ in range(2)], key=lambda x: x[0].key.client
    )
    done_other(other)  # the first client's packet still waits
    assert answers.get(timeout=30).key.client == 1
    done_one(one)
    assert answers.get(timeout=30).key.client == 0
    relay.close()


def test_a_local_stage_is_lost_with_the_stage_above(tiny_models: dict[str, Path]) -> None:
    config = config_of(tiny_models, cut="0:2", trunk__stages="0:1:2")
    ((lower, upper),) = load_trunks(config, "run", "first")
    assert isinstance(lower, LocalTrunk) and lower.rest is upper
    upper.close()
    assert "closed" in str(outcome(lower.send(packet(0))))
