"""TLS: who has a certificate of the authority is served, nobody else, and nobody reads along."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from certificates import Authority

from fedsplit.errors import SettingError
from fedsplit.wire import socket_server
from fedsplit.wire.casting import array_as
from fedsplit.wire.packets import Packet, StepKey
from fedsplit.wire.socket_server import PacketServer
from fedsplit.wire.sockets import Address, PacketClient, Reconnection
from fedsplit.wire.tls import NotTrusted, authority, check_certificates, problem
from fedsplit.wire.transport import FallbackTransport, TrunkLost, Unanswered

KEY = StepKey(1, 2, 3, run="run")

OURS, FOREIGN = Authority(), Authority("foreign")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return OURS.folder(tmp_path_factory.mktemp("tls") / "ours")


def echo(folder: Path) -> Address:
    """Starts a server that sends packets back; returns its address as another machine sees it."""
    server = PacketServer(lambda packet, done: done(packet), "127.0.0.1", str(folder))
    return replace(server.address, name="a name of another machine")


def large(step: int = 0) -> Packet:
    values = np.random.default_rng(step).random(2**21)  # more than the memory of a socket
    return Packet(replace(KEY, step=step), {"hidden": array_as(values, "float64")})


def values_of(packet: Packet) -> bytes:
    return packet.tensors["hidden"].array("values").tobytes()


def test_packets_come_back_as_they_were(folder: Path) -> None:
    client = PacketClient(echo(folder))
    assert client.send(Packet(KEY))() == Packet(KEY)
    answers = [client.send(large(step)) for step in range(3)]
    for step in (2, 0, 1):
        assert values_of(answers[step]()) == values_of(large(step))
    client.close()


def test_neither_side_waits_for_ever_where_both_send_much(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server reads no further before answers are read; the client reads them where it cannot send."""
    monkeypatch.setattr(socket_server, "MOST_UNREAD", 1)
    client = PacketClient(echo(folder))
    answers = [client.send(large(step)) for step in range(6)]
    for step, answer in enumerate(answers):
        assert values_of(answer()) == values_of(large(step))
    client.close()


def test_many_threads_share_a_server(folder: Path) -> None:
    """A connection is read by one thread and written by another at once."""
    address = echo(folder)
    failed: list[int] = []

    def converse(number: int) -> None:
        client = PacketClient(address)
        answers = [client.send(large(number + step)) for step in range(4)]
        if [values_of(answer()) for answer in answers] != [values_of(large(number + step)) for step in range(4)]:
            failed.append(number)
        client.close()

    threads = [threading.Thread(target=converse, args=(10 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads) and failed == []


def test_on_the_same_machine_nothing_is_encrypted(folder: Path) -> None:
    client = PacketClient(PacketServer(lambda packet, done: done(packet), "127.0.0.1", str(folder)).address)
    assert client._connection.family == socket.AF_UNIX and client._stream is client._connection
    assert client.send(Packet(KEY))() == Packet(KEY)
    client.close()


class Wire:
    """A port that passes bytes on to a server, and keeps them."""

    def __init__(self, address: Address) -> None:
        self.seen = {"there": b"", "back": b""}
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._target = (address.host, address.port)
        self.address = replace(address, port=self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        near = self._listener.accept()[0]
        far = socket.create_connection(self._target)
        for name, one, other in (("there", near, far), ("back", far, near)):
            threading.Thread(target=self._pass_on, args=(name, one, other), daemon=True).start()

    def _pass_on(self, name: str, one: socket.socket, other: socket.socket) -> None:
        while came := one.recv(2**16):
            self.seen[name] += came
            other.sendall(came)


@pytest.mark.parametrize("has_tls", [True, False])
def test_who_reads_along_understands_nothing(has_tls: bool, folder: Path) -> None:
    """Without TLS the token, the header and the values are all there to read: the test would see them."""
    server = PacketServer(lambda packet, done: done(packet), "127.0.0.1", str(folder) if has_tls else "")
    wire = Wire(replace(server.address, name="a name of another machine"))
    client = PacketClient(wire.address)
    packet = Packet(KEY, {"hidden": array_as(np.arange(1000.0), "float64")})
    assert client.send(packet)().key == KEY
    client.close()
    there, back = wire.seen["there"], wire.seen["back"]
    assert (server.address.token in there) is not has_tls
    for seen in (there, back):
        assert len(seen) > 8000
        assert (b'"round"' in seen) is not has_tls
        assert (np.arange(500.0, 504.0).tobytes() in seen) is not has_tls


def test_a_client_with_a_certificate_of_another_authority_is_refused(folder: Path, tmp_path: Path) -> None:
    foreign = FOREIGN.folder(tmp_path / "foreign", ca=OURS)  # it trusts the server, and is not trusted
    with pytest.raises(NotTrusted, match="no connection by TLS: tlsv1 alert unknown ca"):
        PacketClient(replace(echo(folder), tls=str(foreign)))


def test_a_server_of_another_authority_is_refused(tmp_path: Path, folder: Path) -> None:
    foreign = FOREIGN.folder(tmp_path / "foreign")
    with pytest.raises(NotTrusted, match="the peer's certificate is refused: self-signed certificate"):
        PacketClient(replace(echo(foreign), tls=str(folder)))


def test_a_client_without_certificates_is_refused_before_it_sends_anything(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NotTrusted, match=r"ca.pem: No such file or directory"):
        PacketClient(replace(echo(folder), tls=str(tmp_path / "nothing")))


def test_a_client_without_tls_is_hung_up_on(folder: Path) -> None:
    served = []
    server = PacketServer(lambda packet, done: served.append(packet), "127.0.0.1", str(folder))
    client = PacketClient(replace(server.address, name="elsewhere", tls=""))
    with pytest.raises(Unanswered):
        client.send(Packet(KEY))()
    assert served == []


def test_the_token_is_needed_beside_a_certificate(folder: Path) -> None:
    client = PacketClient(replace(echo(folder), token=b"0" * 32))
    with pytest.raises(Unanswered):
        client.send(Packet(KEY))()


def test_bytes_that_were_changed_on_the_way_break_the_connection(folder: Path) -> None:
    client = PacketClient(echo(folder))
    answer = client.send(Packet(KEY))
    answer()
    client._connection.sendall(b"\x17\x03\x03\x00\x20" + b"x" * 32)  # a record that no key has made
    with pytest.raises(Unanswered):
        client.send(Packet(KEY))()


def test_after_a_broken_connection_packets_go_over_a_further_one(folder: Path) -> None:
    address = echo(folder)
    first = PacketClient(address)
    way = FallbackTransport(first, Reconnection(address))
    assert way.send(Packet(KEY))() == Packet(KEY)
    first._connection.shutdown(socket.SHUT_RDWR)
    for step in range(3):
        assert way.send(large(step))().key.step == step
    way.forget()
    assert way.send(Packet(KEY))() == Packet(KEY)


def test_a_server_that_is_gone_is_lost() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    gone = Address("elsewhere", b"", "127.0.0.1", port)
    with pytest.raises(TrunkLost, match=r"the trunk cannot be reached any more \(Connection refused\)"):
        Reconnection(gone).send(Packet(KEY))


@pytest.fixture
def broken(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    def make(kind: str) -> Path:
        folder = OURS.folder(tmp_path / kind)
        match kind:
            case "expired":
                OURS.folder(folder, days=-1)
            case "foreign":
                FOREIGN.folder(folder, ca=OURS)
            case "locked":
                OURS.folder(folder, password=b"secret")
            case "no key":
                (folder / "key.pem").unlink()
            case "other key":
                (folder / "key.pem").write_bytes((OURS.folder(tmp_path / "another") / "key.pem").read_bytes())
            case "no certificate":
                (folder / "cert.pem").write_text("certainly")
            case "a folder":
                (folder / "ca.pem").unlink()
                (folder / "ca.pem").mkdir()
        return folder

    yield make


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("expired", r"cert.pem: certificate has expired"),
        ("foreign", r"cert.pem: unable to get local issuer certificate"),
        ("locked", r"key.pem is encrypted by a password"),
        ("no key", r"key.pem: No such file or directory"),
        ("other key", r"key values mismatch"),
        ("no certificate", r"other key: |PEM lib|no start line|not enough data|pem"),
        ("a folder", r"ca.pem: Is a directory"),
    ],
)
def test_certificates_that_cannot_be_used_are_told_in_a_line(
    kind: str, words: str, broken: Callable[[str], Path]
) -> None:
    folder = broken(kind)
    with pytest.raises(SettingError, match=words) as refused:
        check_certificates(str(folder))
    text = str(refused.value)
    assert "\n" not in text
    assert text.startswith(f"wire.tls: {folder} is not possible; allowed: a folder with ca.pem, cert.pem and key.pem (")


def test_a_good_folder_and_none_pass(folder: Path) -> None:
    assert problem(folder) == ""
    check_certificates(str(folder))
    check_certificates("")


def test_an_authority_is_known_by_its_certificate(folder: Path, tmp_path: Path) -> None:
    assert authority(str(folder)) == authority(str(OURS.folder(tmp_path / "second")))
    assert authority(str(folder)) != authority(str(FOREIGN.folder(tmp_path / "foreign")))
