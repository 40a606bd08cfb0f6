"""Servers of the experiments, each in a process of its own. All but Ray's send each packet back."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fedsplit.wire.grpc_address import GrpcAddress
from fedsplit.wire.grpc_client import GrpcClient
from fedsplit.wire.grpc_server import GrpcServer
from fedsplit.wire.identities import read_identities
from fedsplit.wire.packets import Packet
from fedsplit.wire.socket_server import PacketServer
from fedsplit.wire.sockets import PacketClient
from fedsplit.wire.streams import PacketStream, StreamClient

TOKEN = b"a token of the experiments"
Done = Callable[[Packet | Exception], None]
_spawning = multiprocessing.get_context("spawn")


def echo(packet: Packet, done: Done) -> None:
    """Answers a packet by the packet."""
    done(packet)


def _serve(kind: str, root: Path, pipe: Connection) -> None:
    """Serves until the pipe has a message."""
    if kind.startswith("gRPC"):
        identities = read_identities(root / "server") if "TLS" in kind else None
        pipe.send(GrpcServer(echo, token=TOKEN, identities=identities).port)
    else:
        pipe.send(PacketServer(echo, "127.0.0.1").address)
    pipe.recv()


class Server:
    """A server in a process of its own."""

    def __init__(self, kind: str, root: Path) -> None:
        """Starts the process.

        Args:
            kind: "socket", "TCP", "gRPC" or "gRPC, TLS".
            root: Folder of the certificates.
        """
        self._pipe, far = _spawning.Pipe()
        self.process = _spawning.Process(target=_serve, args=(kind, root, far), daemon=True)
        self.process.start()
        self._kind = kind
        self._root = root
        self.address: Any = self._pipe.recv()

    def client(self, port: int | None = None) -> Any:
        """Returns a transport to the server; over another port if there is one, as of a proxy."""
        if self._kind.startswith("gRPC"):
            tls = str(self._root / "client") if "TLS" in self._kind else ""
            return GrpcClient(GrpcAddress("127.0.0.1", port or self.address, tls, TOKEN), 0)
        if self._kind == "socket":
            return PacketClient(self.address)
        elsewhere = replace(self.address, name="elsewhere", port=port or self.address.port)
        return StreamClient(PacketStream(elsewhere))

    def close(self) -> None:
        """Ends the process."""
        self._pipe.send(None)
        self.process.join(30)


class RayServer:
    """An actor of Ray that sends packets back, as the transport that clients use without a socket."""

    def __init__(self) -> None:
        """Starts Ray and an actor."""
        import ray

        from fedsplit.trunk import cluster

        self._ray = ray
        self._cluster = cluster.running(workers=1)
        self._cluster.__enter__()

        class Echo:
            def serve(self, packet: Packet) -> Packet:
                return packet

        self._actor = ray.remote(Echo).options(num_cpus=0).remote()

    def client(self) -> Any:
        """Returns a transport to the actor."""
        return self

    def send(self, packet: Packet) -> Callable[[], Packet]:
        """Sends a packet."""
        reference = self._actor.serve.remote(packet)
        return lambda: self._ray.get(reference)

    def close(self) -> None:
        """Ends Ray."""
        self._cluster.__exit__(None, None, None)
