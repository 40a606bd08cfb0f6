"""A gRPC server: what breaks the rules ends its own stream with a named status, and nobody else notices."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from certificates import Authority
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_parties import (
    LONG,
    TOKEN,
    Answers,
    RawStream,
    at,
    channel,
    echo,
    folders,
    packet,
    servers,
    until,
    values_of,
)
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from fedsplit.errors import InputError, SettingError
from fedsplit.wire import frames, grpc_calls
from fedsplit.wire.chunks import LARGEST_CHUNK, Chunk
from fedsplit.wire.grpc_address import REQUEST
from fedsplit.wire.grpc_calls import RefusedByServer
from fedsplit.wire.grpc_client import GrpcClient
from fedsplit.wire.grpc_schema import CONTROL, SERVICE, ChunkMessage
from fedsplit.wire.grpc_server import GrpcServer
from fedsplit.wire.identities import read_identities
from fedsplit.wire.limits import Limits
from fedsplit.wire.packets import Packet
from fedsplit.wire.steps import StaleStep
from fedsplit.wire.tls import NotTrusted

OURS, FOREIGN = Authority(), Authority("foreign")
LARGE = 2**20
"""Numbers in a packet of 4 MiB, which has five chunks."""

PACKET_BYTES = 2 * LARGEST_CHUNK + 2**10
"""Bytes of a packet with half as many numbers, and a little more."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders(tmp_path_factory.mktemp("tls"), OURS, "a", "b")


@pytest.fixture
def serving() -> Iterator[Callable[..., GrpcServer]]:
    with servers() as start:
        yield start


@pytest.fixture
def witness() -> Iterator[Callable[[GrpcServer], None]]:
    """Checks at the end of a test that another client, who was there from the beginning, has noticed nothing."""
    clients: list[GrpcClient] = []

    def add(server: GrpcServer) -> None:
        client = GrpcClient(at(server.port), client=9)
        assert client.send(packet(0, client=9))().key.client == 9
        clients.append(client)

    yield add
    for client in clients:
        stream = client._playing
        assert values_of(client.send(packet(1, client=9, size=LARGE))()) == values_of(packet(1, client=9, size=LARGE))
        assert client._playing is stream  # the same stream all the time
        client.close()


def test_packets_come_back_as_they_were(serving) -> None:
    server = serving()
    client = GrpcClient(at(server.port), client=0)
    sizes = [1, 100, LARGEST_CHUNK // 4 - 50, LARGE, 3]
    answers = [client.send(packet(step, size=size)) for step, size in enumerate(sizes)]
    for step in (4, 3, 0, 1, 2):
        assert values_of(answers[step]()) == values_of(packet(step, size=sizes[step]))
    assert server.taken == 5
    client.close()


@pytest.mark.parametrize("fault", ["again", "early", "large", "small", "cut", "no chunk", "never-ending", "no packet"])
def test_chunks_out_of_order_end_their_own_stream(fault: str, serving, witness) -> None:
    served: list[Packet] = []

    def serve(one: Packet, done: Answers) -> None:
        served.extend([one] if one.key.client == 0 else [])
        done(one)

    server = serving(serve)
    witness(server)
    stream = RawStream(at(server.port))
    first, second, *rest = stream.chunks_of(packet(size=LARGE))
    words = {
        "again": "chunk 0 came again",
        "early": "chunk 2 came before chunk 1",
        "small": "a chunk of 9 bytes is too small",
        "cut": "the stream ended in the middle of a frame",
        "no chunk": "the message is no chunk",
        "never-ending": "a chunk has neither data nor credit",
        "no packet": "a frame is no packet: a header is too long",
    }
    match fault:
        case "again":
            stream.send(first, first)
        case "early":
            stream.send(first, rest[0])
        case "large":
            stream.send(replace(first, data=bytes(first.data) + b"x" * 5000))
        case "small":
            stream.send(first, replace(second, data=b"x" * 9))
        case "cut":
            stream.send(first, second)
            stream.end()
        case "no chunk":
            stream.send(b"\xff\xff\xff")
        case "never-ending":
            stream.send(first, *[Chunk(1)] * 100)
        case "no packet":
            stream.send(Chunk(0, 40, data=b"x" * 40))
    status, said = stream.status()
    if fault == "large":  # gRPC itself refuses the message
        assert status == "RESOURCE_EXHAUSTED" and "larger than max" in said
    else:
        assert (status, said) == ("INVALID_ARGUMENT", words[fault])
    assert served == []
    stream.vanish()


def test_an_error_is_no_packet_of_a_client(serving, witness) -> None:
    server = serving()
    witness(server)
    stream = RawStream(at(server.port))
    frame = b"".join(frames.pieces_of(0, ValueError("no")))
    stream.send(Chunk(0, len(frame), data=frame))
    assert stream.status() == ("INVALID_ARGUMENT", "a client may send packets only")


def test_a_stream_begins_with_credit(serving) -> None:
    stream = RawStream(at(serving().port), credit=0)
    stream.send(*stream.chunks_of(packet()))
    status, words = stream.status()
    assert status == "INVALID_ARGUMENT" and words.startswith("the first message of a stream must give credit")


def test_a_client_that_vanishes_in_mid_packet_comes_back_and_loses_nothing(serving, witness) -> None:
    server = serving()
    witness(server)
    stream = RawStream(at(server.port))
    stream.send(*stream.chunks_of(packet(size=LARGE))[:2])
    assert stream.receive() is not None
    until(lambda: 0 in server._admissions._open)
    stream.vanish()
    until(lambda: 0 not in server._admissions._open)
    again = RawStream(at(server.port))
    again.send(*again.chunks_of(packet(size=LARGE)))
    number, answer = again.answer()
    assert number == 0 and values_of(answer) == values_of(packet(size=LARGE))
    assert server.taken == 2
    again.end()
    assert again.status()[0] == "OK"


def test_a_client_that_stands_still_in_mid_packet_is_given_up(serving, witness) -> None:
    server = serving(limits=Limits(pause=0.4))
    stream = RawStream(at(server.port))
    stream.send(*stream.chunks_of(packet())[:1])
    assert stream.answer()[0] == 0
    idle = RawStream(at(server.port), client=1)  # between packets a client may be silent for ever
    idle.send(*idle.chunks_of(packet(client=1)))
    assert idle.answer()[0] == 0
    stream.send(*stream.chunks_of(packet(size=LARGE))[:2])
    assert stream.status() == ("DEADLINE_EXCEEDED", "no byte came in 0.4 s in the middle of a frame")
    idle.send(*idle.chunks_of(packet(client=1), number=1))
    assert idle.answer()[0] == 1
    silent = RawStream(at(server.port), client=2, credit=0)
    assert silent.status() == ("DEADLINE_EXCEEDED", "no message came in 0.4 s")


def test_a_slow_reader_slows_itself_alone(serving, witness) -> None:
    """The reader takes no answer: the server soon takes no more packets of this reader, and serves the others."""
    server = serving(limits=Limits(window=2**22))
    witness(server)
    slow = RawStream(at(server.port), credit=1)
    other = GrpcClient(at(server.port), client=1)
    waiting = 0
    sent = 0
    for step in range(20):
        while slow.credit >= sent + PACKET_BYTES and waiting <= step:
            slow.send(*slow.chunks_of(packet(size=LARGE // 2), waiting))
            waiting += 1
            sent += PACKET_BYTES
        assert other.send(packet(step, client=1, size=LARGE))().key.step == step
    assert 2 <= waiting <= 5  # two packets, and those of a window
    slow.send(Chunk(credit=2**25))
    assert [slow.answer()[0] for _ in range(waiting)] == list(range(waiting))
    until(lambda: slow.credit >= sent + PACKET_BYTES)
    other.close()


def test_who_takes_no_answer_at_all_is_given_up(serving, witness) -> None:
    server = serving(limits=Limits(pause=0.4))
    stream = RawStream(at(server.port), credit=1)
    stream.send(*stream.chunks_of(packet()))
    assert stream.status() == ("DEADLINE_EXCEEDED", "no byte was taken in 0.4 s")


def test_bytes_beyond_the_window_end_the_stream(serving, witness) -> None:
    held: list[Answers] = []

    def serve(one: Packet, done: Answers) -> None:
        if one.key.client == 9:
            done(one)
        else:
            held.append(done)

    server = serving(serve, limits=Limits(window=2**21))
    witness(server)
    stream = RawStream(at(server.port))
    for step in range(4):
        stream.send(*stream.chunks_of(packet(step, size=LARGE // 2), step))
    status, words = stream.status()
    assert status == "RESOURCE_EXHAUSTED" and "came where the window of 2097152 bytes had" in words
    assert len(held) <= 2


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(largest_packet=1000), "a frame of "),
        (Limits(pending=2), "more than 2 packets wait for an answer"),
        (Limits(rate=10_000), "more than 10000 bytes a second came"),
    ],
    ids=["packet", "pending", "rate"],
)
def test_limits_have_a_status_and_a_line(limits: Limits, words: str, serving) -> None:
    server = serving(lambda packet, done: None, limits=limits)
    stream = RawStream(at(server.port))
    for step in range(3):
        stream.send(*stream.chunks_of(packet(step, size=50_000), step))
    status, said = stream.status()
    assert status == "RESOURCE_EXHAUSTED" and said.startswith(words) and "\n" not in said


def test_a_client_keeps_within_the_limits_by_itself(serving) -> None:
    """A client with many packets waits for answers, and is not refused."""
    server = serving(limits=Limits(pending=2, window=2**21))
    client = GrpcClient(at(server.port), client=0)
    answers = [client.send(packet(step, size=LARGE // 2)) for step in range(12)]
    assert [answer().key.step for answer in answers] == list(range(12))
    client.close()


def test_streams_and_clients_are_limited(serving) -> None:
    server = serving(limits=Limits(clients=2, streams=1))
    open_streams = [RawStream(at(server.port), client=number) for number in range(2)]
    for stream in open_streams:
        assert stream.receive() is not None
    second, third = RawStream(at(server.port), client=1), RawStream(at(server.port), client=2)
    assert second.status() == ("RESOURCE_EXHAUSTED", "the client has 1 streams already, and may open no more")
    assert third.status() == ("RESOURCE_EXHAUSTED", "the trunk has 2 clients, and takes no more")
    open_streams[0].vanish()
    until(lambda: 0 not in server._admissions._open)
    assert RawStream(at(server.port), client=2).receive() is not None


def test_a_packet_of_another_client_is_not_served(root: Path, serving) -> None:
    served: list[Packet] = []
    server = serving(lambda one, done: (served.append(one), done(one)), identities=read_identities(root / "server"))
    for name, number in (("a", 0), ("b", 1)):
        client = GrpcClient(at(server.port, root / name), number)
        assert client.send(packet(client=number))().key.client == number
        with pytest.raises(NotTrusted, match=f"client {number} sent a packet as client {1 - number}"):
            client.send(packet(client=1 - number))()
        with pytest.raises(NotTrusted):
            client.send(packet(client=number))  # the client is refused once and for all
    assert [one.key.client for one in served] == [0, 1]
    pretender = GrpcClient(at(server.port, root / "a"), 1)
    with pytest.raises(NotTrusted, match="the certificate of client 0 does not make a client 1"):
        pretender.send(packet(client=1))()


def test_the_operator_alone_controls(root: Path, serving) -> None:
    server = serving(identities=read_identities(root / "server"))
    operator = GrpcClient(at(server.port, root / "operator"))
    assert operator.control(b"request") == b"tseuqer"
    with pytest.raises(NotTrusted, match="the operator is no client, and may send no packets"):
        operator.send(packet())()
    with pytest.raises(NotTrusted, match="client 0 is not the operator, and may not control the run"):
        GrpcClient(at(server.port, root / "a")).control(b"request")


@pytest.mark.parametrize("tls", [True, False], ids=["tls", "plain"])
def test_a_wrong_token_is_refused(tls: bool, root: Path, serving) -> None:
    server = serving(identities=read_identities(root / "server") if tls else None)
    address = replace(at(server.port, root / "a" if tls else ""), token=b"guess")
    for call in (lambda client: client.send(packet())(), lambda client: client.control(b"request")):
        with pytest.raises(NotTrusted, match="the token of the run is missing or wrong"):
            call(GrpcClient(address, 0))
    assert server.taken == 0


@pytest.mark.parametrize("kind", ["expired", "foreign", "unknown"])
def test_a_certificate_that_does_not_fit_is_refused_by_the_server(
    kind: str, root: Path, tmp_path: Path, serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client's own check is left out: a stranger has none."""
    monkeypatch.setattr(grpc_calls, "problem", lambda folder: "")
    server = serving(identities=read_identities(root / "server"))
    witness = GrpcClient(at(server.port, root / "b"), 1)
    assert witness.send(packet(client=1))().key.client == 1
    folder = tmp_path / kind
    match kind:
        case "expired":
            OURS.folder(folder, days=-1, name="a")
        case "foreign":
            FOREIGN.folder(folder, ca=OURS, name="a")
        case "unknown":
            OURS.folder(folder, name="c")
    words = "the certificate's name 'c' is no client's name" if kind == "unknown" else "the server does not accept"
    with pytest.raises(NotTrusted, match=words):
        GrpcClient(at(server.port, folder), 0).send(packet())()
    assert server.taken == 1
    assert witness.send(packet(1, client=1))().key.step == 1
    witness.close()


def test_a_caller_without_a_certificate_is_not_answered(root: Path, serving) -> None:
    server = serving(identities=read_identities(root / "server"))
    authority = grpc.ssl_channel_credentials((root / "a" / "ca.pem").read_bytes())
    for there in (grpc.secure_channel(at(server.port).target, authority), channel(at(server.port))):
        with there, pytest.raises(grpc.RpcError) as refused:
            health_pb2_grpc.HealthStub(there).Check(health_pb2.HealthCheckRequest(), timeout=LONG)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("kind", ["expired", "foreign"])
def test_a_client_with_certificates_that_do_not_fit_says_so_at_once(kind: str, tmp_path: Path) -> None:
    folder = OURS.folder(tmp_path, days=-1) if kind == "expired" else FOREIGN.folder(tmp_path, ca=OURS)
    with pytest.raises(NotTrusted, match=r"cert.pem: (certificate has expired|unable to get local issuer)"):
        GrpcClient(at(1, folder), 0)


def test_a_server_of_another_authority_or_name_is_not_trusted(root: Path, tmp_path: Path, serving) -> None:
    server = serving(identities=read_identities(root / "server"))
    foreign = folders(tmp_path, FOREIGN, "a")
    with pytest.raises(NotTrusted, match=r"the peer's certificate is refused: (self-signed|unable to get)"):
        GrpcClient(at(server.port, foreign / "a"), 0).send(packet())()
    elsewhere = replace(at(server.port, root / "a"), host="127.0.0.2")  # the certificate is for 127.0.0.1
    server_there = serving(identities=read_identities(root / "server"), host="127.0.0.2")
    with pytest.raises(NotTrusted, match="the peer's certificate is refused: IP address mismatch"):
        GrpcClient(replace(elsewhere, port=server_there.port), 0).send(packet())()


def test_a_server_listens_with_certificates_or_on_loopback(root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"0.0.0.0: without certificates, gRPC is for this machine only"):
        GrpcServer(echo, host="0.0.0.0", token=TOKEN)
    broken = folders(tmp_path, OURS, "a") / "server"
    OURS.folder(broken, days=-1)
    with pytest.raises(SettingError, match="certificate has expired"):
        GrpcServer(echo, token=TOKEN, identities=read_identities(broken))
    with pytest.raises(InputError, match="a server needs a token"):
        GrpcServer(echo, token=b"")


def test_a_port_has_one_server(serving) -> None:
    with pytest.raises(OSError, match=r"gRPC cannot listen at 127\.0\.0\.1:"):
        serving(port=serving().port)


def test_errors_are_answers(serving) -> None:
    def serve(one: Packet, done: Answers) -> None:
        done(StaleStep("late") if one.key.step else MemoryError("none is left"))

    client = GrpcClient(at(serving(serve).port))
    answers = [client.send(packet(step)) for step in range(2)]
    with pytest.raises(frames.TrunkFailed, match="none is left"):
        answers[0]()
    with pytest.raises(StaleStep, match="late"):
        answers[1]()
    client.close()


def test_nothing_of_a_packet_is_kept_while_the_next_one_is_waited_for(serving) -> None:
    kept: list[weakref.ref[np.ndarray]] = []

    def serve(one: Packet, done: Answers) -> None:
        answer = packet(1, size=LARGE)
        kept.extend(weakref.ref(p.tensors["hidden"].array("values")) for p in (one, answer))
        done(answer)

    client = GrpcClient(at(serving(serve).port))
    client.send(packet(size=LARGE))()
    until(lambda: all(reference() is None for reference in kept))
    assert len(kept) == 2
    client.close()


def test_many_clients_are_served_at_once(serving) -> None:
    server = serving()
    wrong: list[int] = []

    def converse(number: int) -> None:
        client = GrpcClient(at(server.port), number)
        answers = [client.send(packet(step, client=number, size=LARGE // 8)) for step in range(8)]
        for step, answer in enumerate(answers):
            if values_of(answer()) != values_of(packet(step, size=LARGE // 8)):
                wrong.append(number)
        client.close()

    threads = [threading.Thread(target=converse, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == [] and server.taken == 128
    until(lambda: not server._admissions._open)


def test_health_and_reflection_are_grpcs_own(serving) -> None:
    with channel(at(serving().port)) as there:
        health = health_pb2_grpc.HealthStub(there)
        for name in ("", SERVICE):
            answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=LONG)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(there)
        asked = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
        ]
        services, file = reflection.ServerReflectionInfo(iter(asked), timeout=LONG)
        assert SERVICE in {service.name for service in services.list_services_response.service}
        described = file.file_descriptor_response.file_descriptor_proto
        assert described == [ChunkMessage.DESCRIPTOR.file.serialized_pb]


@pytest.mark.parametrize("size", [1, 5 * 2**20], ids=["small", "large"])
def test_control_requests_of_any_size_get_their_reply(size: int, serving) -> None:
    request = np.random.default_rng(0).bytes(size)
    assert GrpcClient(at(serving().port)).control(request) == request[::-1]


def test_control_requests_of_many_threads_get_their_own_replies(serving) -> None:
    client = GrpcClient(at(serving().port))
    came: queue.SimpleQueue[tuple[int, bytes]] = queue.SimpleQueue()

    def ask(number: int) -> None:
        came.put((number, client.control(b"%d!" % number)))

    for number in range(12):
        threading.Thread(target=ask, args=(number,), daemon=True).start()
    for _ in range(12):
        number, reply = came.get(timeout=LONG)
        assert reply == (b"%d!" % number)[::-1]


@pytest.mark.parametrize(
    ("error", "kind"), [(StaleStep("gone by"), StaleStep), (ValueError("no such round"), frames.TrunkFailed)], ids=repr
)
def test_errors_of_control_requests_are_raised(error: Exception, kind: type[Exception], serving) -> None:
    asked = []

    def control(request: bytes, done: Any) -> None:
        asked.append(request)
        done(error)

    with pytest.raises(kind, match=str(error)):
        GrpcClient(at(serving(control=control).port)).control(b"request")
    assert asked == [b"request"]


def test_a_control_request_that_is_too_large_is_refused(serving) -> None:
    client = GrpcClient(at(serving(limits=Limits(largest_control=1000)).port))
    with pytest.raises(RefusedByServer, match="a frame of 2000 bytes is too large") as refused:
        client.control(b"x" * 2000)
    assert refused.value.status == "RESOURCE_EXHAUSTED"
    with pytest.raises(ValueError, match="may not be empty"):
        client.control(b"")


def test_a_control_request_needs_an_identity(serving) -> None:
    assert RawStream(at(serving().port), method=CONTROL).status() == (
        "INVALID_ARGUMENT",
        f"the request has no {REQUEST}",
    )
