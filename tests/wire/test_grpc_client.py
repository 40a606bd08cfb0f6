"""A client over gRPC: a broken stream is opened again, nothing is lost or counted twice, and refusals are final."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from certificates import Authority
from grpc_health.v1 import health, health_pb2_grpc
from grpc_parties import LONG, TOKEN, Answers, at, echo, folders, packet, servers, until, values_of
from split_models import RAW, parts_of, server_of

from fedsplit.errors import InputError
from fedsplit.settings.sections import TrunkSettings
from fedsplit.trunk.service import TrunkService
from fedsplit.wire import grpc_calls
from fedsplit.wire.grpc_calls import RefusedByServer
from fedsplit.wire.grpc_client import GrpcClient
from fedsplit.wire.grpc_server import GrpcServer
from fedsplit.wire.identities import read_identities
from fedsplit.wire.limits import Limits
from fedsplit.wire.packets import Packet, StepKey
from fedsplit.wire.tls import NotTrusted
from fedsplit.wire.transport import TrunkLost, Unanswered

LARGE = 2**20


@pytest.fixture
def serving() -> Iterator[Callable[..., GrpcServer]]:
    with servers() as start:
        yield start


class Wire:
    """A port that passes bytes on to a server, until a test breaks the connections."""

    def __init__(self, target: int) -> None:
        self.most: int | None = None
        self.swallowed = 0
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._target = target
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near = self._listener.accept()[0]
            far = socket.create_connection(("127.0.0.1", self._target))
            self.connections += 1
            self._sockets += [near, far]
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._pass_on, args=(one, other, self.connections), daemon=True).start()

    def _pass_on(self, one: socket.socket, other: socket.socket, number: int) -> None:
        try:
            while came := one.recv(2**16):
                if number <= self.swallowed:
                    continue
                if self.most is not None:
                    self.most -= len(came)
                    if self.most < 0:
                        self.most = None
                        self.cut()
                        return
                other.sendall(came)
        except OSError:
            pass
        finally:
            for end in (one, other):
                end.close()

    def swallow(self) -> None:
        """Loses all bytes of the connections so far, and leaves the connections open, as a broken cable does."""
        self.swallowed = self.connections

    def cut(self, after: int | None = None) -> None:
        """Breaks all connections: now, or after a number of bytes."""
        if after is not None:
            self.most = after
            return
        for end in self._sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._sockets.clear()


class Once:
    """Serves each step once, as a trunk does. Answers of repeated steps are those of before."""

    def __init__(self) -> None:
        self.counts: dict[StepKey, int] = {}
        self.served: dict[StepKey, Packet] = {}
        self.holds = False
        self.held: list[tuple[Packet, Answers]] = []

    def __call__(self, one: Packet, done: Answers) -> None:
        if self.holds:
            self.held.append((one, done))
            return
        self.counts[one.key] = self.counts.get(one.key, 0) + 1
        done(self.served.setdefault(one.key, one))

    def release(self) -> None:
        """Serves the packets that were held."""
        self.holds = False
        for one, done in self.held:
            self(one, done)


def test_packets_without_an_answer_are_sent_again_after_a_broken_connection(serving) -> None:
    trunk = Once()
    wire = Wire(serving(trunk).port)
    client = GrpcClient(at(wire.port), 0)
    assert client.send(packet(0))().key.step == 0
    trunk.holds = True
    answers = [client.send(packet(step, size=LARGE)) for step in range(1, 4)]
    until(lambda: len(trunk.held) == 3)
    wire.cut()
    until(lambda: len(trunk.held) == 6)
    trunk.release()
    for step, answer in enumerate(answers, start=1):
        assert values_of(answer()) == values_of(packet(step, size=LARGE))
    assert set(trunk.counts) == {packet(step).key for step in range(4)}
    assert trunk.counts[packet(0).key] == 1  # what has its answer is not sent again
    client.close()


@pytest.mark.parametrize("after", [10_000, 3_000_000, 5_000_000], ids=["first chunk", "packet", "answer"])
def test_a_connection_that_breaks_in_mid_packet_loses_nothing(after: int, serving) -> None:
    trunk = Once()
    wire = Wire(serving(trunk).port)
    client = GrpcClient(at(wire.port), 0)
    client.send(packet(0))()
    wire.cut(after)
    answers = [client.send(packet(step, size=LARGE)) for step in range(1, 4)]
    for step, answer in enumerate(answers, start=1):
        assert values_of(answer()) == values_of(packet(step, size=LARGE))
    assert len(trunk.served) == 4 and wire.most is None
    client.close()


def test_a_connection_on_which_nothing_comes_any_more_is_noticed_by_keepalive(
    serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = dict.fromkeys(("grpc.keepalive_time_ms", "grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms"), 500)
    options = dict(grpc_calls._CHANNEL_OPTIONS)
    assert quick.keys() <= options.keys()
    monkeypatch.setattr(grpc_calls, "_CHANNEL_OPTIONS", [*{**options, **quick}.items()])
    wire = Wire(serving(Once()).port)
    client = GrpcClient(at(wire.port), 0)
    assert client.send(packet(0))().key.step == 0
    wire.swallow()
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(client.send(packet(1))).result(LONG).key.step == 1
    assert wire.connections == 2
    client.close()


def test_a_server_that_starts_again_at_the_same_port_gets_what_was_not_answered(serving) -> None:
    first = Once()
    server = GrpcServer(first, token=TOKEN)
    clients = [GrpcClient(at(server.port), number) for number in range(3)]
    for number, client in enumerate(clients):
        assert client.send(packet(0, client=number))().key.client == number
    first.holds = True
    answers = [client.send(packet(1, client=number)) for number, client in enumerate(clients)]
    until(lambda: len(first.held) == 3)
    server.close()
    second = Once()
    serving(second, port=server.port)
    assert [answer().key.client for answer in answers] == [0, 1, 2]
    assert second.counts == {packet(1, client=number).key: 1 for number in range(3)}
    first.release()  # answers that come too late harm nobody
    for client in clients:
        client.close()


def test_a_server_that_stays_away_is_lost_and_may_come_back(serving) -> None:
    server = GrpcServer(echo, token=TOKEN)
    client = GrpcClient(at(server.port), 0, patience=0.3)
    client.send(packet(0))()
    server.close()
    answers = [client.send(packet(step)) for step in (1, 2)]
    for answer in answers:
        with pytest.raises(TrunkLost, match=r"the trunk cannot be reached any more \(.*\)"):
            answer()
    with pytest.raises(TrunkLost):
        client.control(b"request")
    serving(port=server.port)
    assert client.send(packet(3))().key.step == 3
    client.close()


def test_the_caller_goes_on_while_a_packet_waits(serving) -> None:
    trunk = Once()
    trunk.holds = True
    client = GrpcClient(at(serving(trunk).port), 0)
    answers = [client.send(packet(step, size=2**22)) for step in range(4)]  # 16 MiB each
    trunk.release()
    until(lambda: len(trunk.served) == 4)
    for step in (2, 2, 0, 3, 1):
        assert answers[step]().key.step == step
    client.close()


@pytest.mark.parametrize("size", [20_000, 200_000, 600_000], ids=["small", "one chunk", "three chunks"])
def test_more_bytes_than_a_window_has_cross_in_both_directions(
    size: int, serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_calls, "_WINDOW", 2**21)
    client = GrpcClient(at(serving(limits=Limits(window=2**21)).port), 0)
    for step in range(2 + 3 * 2**19 // size):
        answers: queue.SimpleQueue[Packet] = queue.SimpleQueue()
        waiting = client.send(packet(step, size=size))
        threading.Thread(target=lambda waiting, answers: answers.put(waiting()), args=(waiting, answers)).start()
        assert answers.get(timeout=LONG).key.step == step
    client.close()


def test_forgotten_packets_are_neither_answered_nor_sent_again(serving) -> None:
    trunk = Once()
    trunk.holds = True
    wire = Wire(serving(trunk).port)
    client = GrpcClient(at(wire.port), 0)
    forgotten = client.send(packet(0))
    until(lambda: len(trunk.held) == 1)
    client.forget()
    with pytest.raises(Unanswered, match="the answer was dropped by `forget`"):
        forgotten()
    wire.cut()
    kept = client.send(packet(1))
    until(lambda: len(trunk.held) == 2)
    trunk.release()
    assert kept().key.step == 1
    assert [one.key.step for one, _ in trunk.held] == [0, 1]
    client.close()


def test_a_closed_client_answers_nobody(serving) -> None:
    client = GrpcClient(at(serving(lambda one, done: None).port), 0)
    waiting = client.send(packet(0))
    client.close()
    client.close()
    with pytest.raises(Unanswered, match="the connection is closed"):
        waiting()
    with pytest.raises(Unanswered, match="the connection is closed"):
        client.send(packet(1))


def test_a_refusal_is_final_and_other_packets_hear_of_it(serving) -> None:
    client = GrpcClient(at(serving(lambda one, done: None, limits=Limits(largest_packet=1000)).port), 0)
    answers = [client.send(packet(0)), client.send(packet(1, size=100_000))]
    for answer in answers:
        with pytest.raises(RefusedByServer, match=r"a frame of .* is too large.*\(RESOURCE_EXHAUSTED\)") as refused:
            answer()
    assert refused.value.status == "RESOURCE_EXHAUSTED"
    with pytest.raises(RefusedByServer):
        client.send(packet(2))
    copied = pickle.loads(pickle.dumps(refused.value))
    assert (str(copied), copied.status) == (str(refused.value), refused.value.status)


def test_a_client_that_was_welcome_waits_until_the_server_has_forgotten_its_old_stream(serving) -> None:
    """The first connection is cut off without a word to the server, which counts the old stream on."""
    server = serving(limits=Limits(streams=1))
    wire = Wire(server.port)
    client = GrpcClient(at(wire.port), 0)
    client.send(packet(0))()
    leave = server._admissions._leave
    left: list[object] = []
    server._admissions._leave = left.append  # type: ignore[method-assign]
    wire.cut()
    answer = client.send(packet(1))
    until(lambda: left == [0])
    server._admissions._leave = leave  # type: ignore[method-assign]
    leave(0)
    assert answer().key.step == 1
    client.close()


def test_what_does_not_speak_the_protocol_is_no_trunk(serving) -> None:

    other = grpc.server(ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), other)
    port = other.add_insecure_port("127.0.0.1:0")
    other.start()
    with pytest.raises(RefusedByServer, match="UNIMPLEMENTED"):
        GrpcClient(at(port), 0).send(packet(0))()
    other.stop(None)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpc_calls, "_WELCOME_SECONDS", 0.2)
        with pytest.raises(TrunkLost, match=r"the server is silent for 0\.2 s"):
            GrpcClient(at(silent.getsockname()[1]), 0, patience=0.1).send(packet(0))()


def test_an_address_off_this_machine_needs_certificates(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="without certificates"):
        GrpcClient(replace(at(1), host="192.0.2.1"))
    with pytest.raises(NotTrusted, match=r"ca\.pem: No such file or directory"):
        GrpcClient(at(1, tmp_path))


def test_over_tls_a_broken_connection_is_opened_again(serving, tmp_path: Path) -> None:
    root = folders(tmp_path, Authority(), "a")
    trunk = Once()
    server = serving(trunk, identities=read_identities(root / "server"))
    wire = Wire(server.port)
    client = GrpcClient(at(wire.port, root / "a"), 0)
    for step in range(3):
        assert values_of(client.send(packet(step, size=LARGE))()) == values_of(packet(step, size=LARGE))
        wire.cut()
    assert len(trunk.served) == 3
    client.close()


class Control:
    """Replies to control requests when a test says so."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self.done: list[Any] = []

    def __call__(self, request: bytes, done: Any) -> None:
        self.asked.append(request)
        self.done.append(done)


def asking(client: GrpcClient, request: bytes) -> tuple[threading.Thread, list[Any]]:
    """Sends a control request on a thread; the list gets the reply or the error."""
    came: list[Any] = []

    def ask() -> None:
        try:
            came.append(client.control(request))
        except Exception as error:  # noqa: BLE001  # the test looks at it
            came.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    return thread, came


def test_a_control_request_is_carried_out_once_over_several_connections(serving) -> None:
    control = Control()
    wire = Wire(serving(control=control).port)
    thread, came = asking(GrpcClient(at(wire.port)), b"r" * 3_000_000)
    until(lambda: len(control.asked) == 1)
    wire.cut()
    control.done[0](b"reply" * 1_000_000)
    thread.join(LONG)
    assert came == [b"reply" * 1_000_000]
    assert len(control.asked) == 1


def test_a_control_request_is_not_carried_out_by_a_server_that_was_started_again(serving) -> None:
    control = Control()
    server = GrpcServer(echo, control, token=TOKEN)
    thread, came = asking(GrpcClient(at(server.port)), b"request")
    until(lambda: len(control.asked) == 1)
    server.close()
    second = Control()
    serving(control=second, port=server.port)
    thread.join(LONG)
    assert isinstance(came[0], TrunkLost) and "the trunk was started again" in str(came[0])
    assert second.asked == []


@pytest.mark.parametrize("end", ["before the reply", "after the reply"])
@pytest.mark.parametrize("error", [asyncio.CancelledError(), grpc.aio.InternalError("closed")], ids=["cancel", "close"])
def test_a_stream_that_breaks_carries_no_request_twice(
    error: BaseException, end: str, serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gRPC raises `CancelledError` for a stream that has been cancelled, as for a task that this side cancels."""
    ended: list[str] = []
    asked: list[bytes] = []

    class Breaking(grpc_calls.ChunkStream[Any]):
        """Breaks once, at the wait for the reply or at the farewell."""

        waits = 0

        async def receive(self, count: Callable[[int], None] = lambda size: None) -> Any:
            self.waits += 1
            if not ended and self.waits == (1 if end == "before the reply" else 2):
                ended.append(end)
                raise error
            return await super().receive(count)

    def control(request: bytes, done: Any) -> None:
        asked.append(request)
        done(b"reply")

    monkeypatch.setattr(grpc_calls, "_WELCOME_SECONDS", 0.5)
    monkeypatch.setattr(grpc_calls, "ChunkStream", Breaking)
    thread, came = asking(GrpcClient(at(serving(control=control).port)), b"request")
    thread.join(LONG)
    assert came == [b"reply"] and ended == [end] and len(asked) == 1


def test_a_server_that_hangs_during_a_control_request_is_lost(serving) -> None:
    """The process answers gRPC's pings still. Packets may wait for as long as they like."""
    packets: list[Any] = []
    requests: list[Any] = []
    server = serving(lambda one, done: packets.append(done), control=lambda request, done: requests.append(done))
    client = GrpcClient(at(server.port), None, silence=0.3)
    answer = client.send(packet(0))
    with pytest.raises(TrunkLost, match=r"the trunk's server has not answered for 0\.3 seconds"):
        client.control(b"request")
    until(lambda: len(packets) == len(requests) == 1)  # in either order
    packets[0](packet(0))
    assert answer().key.step == 0
    client.close()


class Service:
    """A trunk service with a thread of its own."""

    def __init__(self, trunk: Any) -> None:
        self.server = server_of(trunk)
        self.service = TrunkService(self.server, TrunkSettings())
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            self.service.work()


def test_a_trunk_behind_grpc_is_the_trunk_itself(serving, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Answers and adapters are equal to the bit, over connections that break again and again."""
    here = server_of(parts_of(tiny_models["llama"], (1, 2))[1])
    there = Service(parts_of(tiny_models["llama"], (1, 2))[1])
    root = folders(tmp_path, Authority(), "a", "b")
    server = serving(there.service.submit, identities=read_identities(root / "server"))
    wire = Wire(server.port)
    clients = [GrpcClient(at(wire.port, root / name), number) for number, name in enumerate("ab")]
    generator = torch.Generator().manual_seed(0)
    for step in range(6):
        for number, client in enumerate(clients):
            key = StepKey(1, number, step, run="run")
            for name, call in (("hidden", here.forward), ("gradient", here.backward)):
                tensor = torch.randn(2, 5, 32, generator=generator)
                sent = Packet(key, {name: RAW.encode(tensor)}, incarnation="first")
                expected = call(sent)
                if step % 2:
                    wire.cut(after=1000)
                came = client.send(sent)()
                assert torch.equal(RAW.decode(came.tensors[name]), RAW.decode(expected.tensors[name])), (step, name)
    assert wire.connections > 4
    ours, theirs = here.adapters.read().tensors, there.server.adapters.read().tensors
    assert ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    for client in clients:
        client.close()
