"""Parties of a gRPC trunk for tests: folders of certificates, and a peer that sends whatever chunks a test wants."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from certificates import Authority

from fedsplit.wire import frames
from fedsplit.wire.casting import array_as
from fedsplit.wire.chunks import Assembler, Chunk, cut, nbytes_of
from fedsplit.wire.grpc_address import CLIENT, GrpcAddress, authorization
from fedsplit.wire.grpc_schema import PACKETS
from fedsplit.wire.grpc_server import GrpcServer
from fedsplit.wire.packets import Packet, StepKey

TOKEN = b"the token of the run"
LONG = 30.0
"""Seconds that a test waits at most for what must happen."""

Answers = Callable[[Packet | Exception], None]


def packet(step: int = 0, client: int = 0, size: int = 1) -> Packet:
    """Returns a packet with `size` numbers of 4 bytes, which differ from step to step."""
    key = StepKey(1, client, step, run="run")
    values = np.random.default_rng(step).random(size, np.float32)
    return Packet(key, {"hidden": array_as(values, "float32")})


def values_of(packet: Packet) -> bytes:
    """Returns the bytes of a packet's array."""
    return packet.tensors["hidden"].array("values").tobytes()


def echo(packet: Packet, done: Answers) -> None:
    """Answers a packet by the packet."""
    done(packet)


@contextlib.contextmanager
def servers() -> Iterator[Callable[..., GrpcServer]]:
    """Yields a function that starts a server, and closes all of them at the end."""
    started: list[GrpcServer] = []

    def start(serve: Any = echo, control: Any = lambda request, done: done(request[::-1]), **how: Any) -> GrpcServer:
        started.append(GrpcServer(serve, control, **{"token": TOKEN, **how}))
        return started[-1]

    yield start
    for server in started:
        server.close()


def at(port: int, tls: Path | str = "") -> GrpcAddress:
    """Returns the address of a server of this machine."""
    return GrpcAddress("127.0.0.1", port, str(tls), TOKEN)


def until(is_so: Callable[[], bool]) -> None:
    """Waits until something is so, for a long time at most."""
    end = time.monotonic() + LONG
    while not is_so():
        assert time.monotonic() < end, "what must happen did not happen"
        time.sleep(0.005)


def write_clients(folder: Path, *names: str) -> None:
    """Writes the file of a server's clients, numbered in order."""
    lines = [f"{name} = {number}" for number, name in enumerate(names)]
    (folder / "clients.toml").write_text("\n".join(['federation = "operator"', "[clients]", *lines]))


def folders(root: Path, authority: Authority, *clients: str) -> Path:
    """Writes the folders of a server, an operator and clients, with the names of their certificates."""
    for name in ("server", "operator", *clients):
        authority.folder(root / name, name=name)
    write_clients(root / "server", *clients)
    return root


class RawStream:
    """A stream of packets on which a test sends any chunks. It uses gRPC's other library, which has no event loop."""

    def __init__(
        self, address: GrpcAddress, client: int | None = 0, method: str = PACKETS, credit: int = 2**25
    ) -> None:
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._channel = channel(address)
        said = [authorization(address.token)]
        if client is not None:
            said.append((CLIENT, str(client)))
        self.call: Any = self._channel.stream_stream(method)(iter(self._outgoing.get, None), metadata=said)
        self._came: queue.SimpleQueue[Chunk | grpc.RpcError | None] = queue.SimpleQueue()
        self._assembler = Assembler(lambda total: frames.reading(), 2**30)
        self._next = 0
        self.credit = 0
        threading.Thread(target=self._read, daemon=True).start()
        if credit:
            self.send(Chunk(credit=credit))

    def _read(self) -> None:
        try:
            for message in self.call:
                chunk = Chunk.from_bytes(message)
                self.credit += chunk.credit
                self._came.put(chunk)
        except grpc.RpcError as error:
            self._came.put(error)
        self._came.put(None)

    def send(self, *chunks: Chunk | bytes) -> None:
        """Sends chunks, or other bytes."""
        for chunk in chunks:
            self._outgoing.put(chunk if isinstance(chunk, bytes) else chunk.to_bytes())

    def chunks_of(self, packet: Packet, number: int = 0) -> list[Chunk]:
        """Returns the chunks of a packet, numbered behind those of all packets before."""
        pieces = frames.pieces_of(number, packet)
        chunks = []
        for data in cut(pieces):
            total = 0 if chunks else nbytes_of(pieces)
            chunks.append(Chunk(self._next, total, data=b"".join(data)))
            self._next += 1
        return chunks

    def end(self) -> None:
        """Says that no more chunks come."""
        self._outgoing.put(None)

    def receive(self) -> Chunk | None:
        """Waits for a message; None after the end of the stream."""
        came = self._came.get(timeout=LONG)
        return None if isinstance(came, grpc.RpcError) else came

    def answer(self) -> tuple[int, Packet | Exception]:
        """Waits for an answer."""
        while (chunk := self.receive()) is not None:
            if chunk.data and (frame := self._assembler.take(chunk)) is not None:
                return frame
        raise EOFError

    def status(self) -> tuple[str, str]:
        """Waits for the end of the stream. Returns the status and its words."""
        while self.receive() is not None:
            pass
        return self.call.code().name, self.call.details()

    def vanish(self) -> None:
        """Ends the connection without a word."""
        self._channel.close()
        self._outgoing.put(None)


def channel(address: GrpcAddress) -> Any:
    """Returns a channel of gRPC's library with threads."""
    options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    if not address.tls:
        return grpc.insecure_channel(address.target, options)
    files = [(Path(address.tls) / name).read_bytes() for name in ("ca.pem", "key.pem", "cert.pem")]
    return grpc.secure_channel(address.target, grpc.ssl_channel_credentials(*files), options)
