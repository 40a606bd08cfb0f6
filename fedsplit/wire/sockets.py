"""Sockets as transport: the client's side of packets between processes of one machine or of two.

The server's side is `fedsplit.wire.socket_server`.

A call of a Ray actor with a packet of the bundled model passes through some ten threads, and takes 2 ms, or 3 to 4 ms
between processes that have just computed. A packet over a socket takes 0.2 to 0.7 ms.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from fedsplit.wire import frames
from fedsplit.wire.packets import Packet
from fedsplit.wire.tls import NotTrusted, SecureConnection, refusal
from fedsplit.wire.transport import PendingAnswer, TrunkLost, Unanswered, remembered

GREETING_SECONDS = 10.0
"""Longest wait of either side for the first bytes of the other side."""

WELCOME = b"+"
"""First byte of a server with TLS. A client learns at once whether its certificate is accepted."""

FIRST = 0
"""Number of a client's first packet."""


@dataclass(frozen=True)
class Address:
    """Address of a server, with the server's token.

    Attributes:
        name: Name of the socket in Linux's abstract namespace. The end of the process leaves no file behind.
        token: First bytes that a client sends. Without the token, the server hangs up.
        host: IP address by which other machines reach the server; empty if no other machine may.
        port: TCP port of the server.
        tls: Folder with the certificates of each machine, for connections over TCP; empty if they are not encrypted.
    """

    name: str
    token: bytes
    host: str = ""
    port: int = 0
    tls: str = ""


def is_possible() -> bool:
    """Returns True if this system has sockets in an abstract namespace."""
    return sys.platform == "linux"


def _connected(address: Address) -> socket.socket:
    """Returns a connection to a server: by the name on this machine, or else over TCP.

    Raises:
        OSError: The server cannot be reached.
    """
    if is_possible():
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(place(address))
        except OSError:  # the server is on another machine, or gone
            connection.close()
            if not address.host:
                raise
        else:
            return connection
    connection = socket.create_connection((address.host, address.port), GREETING_SECONDS)
    connection.settimeout(None)
    # The limit was for connecting alone: an answer may take any time.
    tune(connection)
    return connection


def _stream_to(address: Address, connection: socket.socket) -> frames.Connection:
    """Returns a connection to a server as bytes pass over it: encrypted if it leaves this machine, and if there is TLS.

    Raises:
        OSError: The connection is broken.
        NotTrusted: The server does not accept the certificate of this machine, or the other way round.
    """
    if not address.tls or connection.family == socket.AF_UNIX:
        return connection
    connection.settimeout(GREETING_SECONDS)
    stream = SecureConnection(connection, address.tls, is_server=False)
    try:
        frames.read(stream, len(WELCOME))
    except ssl.SSLError as error:
        raise NotTrusted(refusal(error)) from error
    connection.settimeout(None)
    return stream


Connected = tuple[socket.socket, frames.Connection]
"""A socket, and the connection over the socket as bytes pass: encrypted or not."""


def connect(address: Address) -> Connected:
    """Returns a connection to a server that has got the token: the socket, and the connection as bytes pass over it.

    Raises:
        OSError: The server cannot be reached.
        NotTrusted: The server does not accept the certificate of this machine, or the other way round.
    """
    connection = _connected(address)
    try:
        stream = _stream_to(address, connection)
        stream.sendmsg([memoryview(address.token)])
    except BaseException:
        connection.close()
        raise
    return connection, stream


def tune(connection: socket.socket) -> None:
    """Has TCP send packets at once, and notice within half a minute that a machine is gone."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):  # not every system has these options
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def place(address: Address) -> str:
    """Returns the name of a server's socket for the system: the leading zero stands for the abstract namespace."""
    return "\0" + address.name


class PacketClient:
    """A connection to a `PacketServer`. Not thread-safe.

    Attributes:
        is_open: False once the connection is broken or closed.
    """

    def __init__(self, address: Address, connected: Connected | None = None) -> None:
        """Connects to a server.

        Args:
            address: Address of the server.
            connected: Result of `connect`; None to connect now.

        Raises:
            OSError: No server that this machine can reach listens at the address.
            NotTrusted: The server does not accept the certificate of this machine, or the other way round.
        """
        self._connection, self._stream = connected or connect(address)
        self.is_open = True
        self._next = FIRST
        self._oldest = 0
        self._came: dict[int, Packet | Exception] = {}

    def send(self, packet: Packet) -> PendingAnswer:
        """Sends a packet.

        Returns:
            A function that waits for the answer, and may be called again. Raises the trunk's error, a `RefusedStep` or
            `TrunkFailed`; or `Unanswered` if the connection breaks.

        Raises:
            Unanswered: The connection is broken.
        """
        number = self._next
        self._next += 1
        with self._guarded():
            frames.send(self._stream, number, packet, self._make_way)
        return remembered(lambda: self._wait(number))

    def _wait(self, number: int) -> Packet | Exception:
        if number < self._oldest:
            raise Unanswered("the answer was dropped by `forget`")
        while number not in self._came:
            with self._guarded():
                self._take_answer()
        return self._came.pop(number)

    def _take_answer(self) -> None:
        """Waits for the next answer to any packet."""
        came, answer = frames.receive(self._stream)
        # A forgotten answer is read all the same: the next frame begins behind it.
        if came >= self._oldest:
            self._came[came] = answer

    def _make_way(self) -> None:
        """Reads answers until the connection takes more bytes.

        A server with too many unread answers stops reading. A client that only sent would then wait for ever.
        """
        either = select.poll()
        either.register(self._connection, select.POLLIN | select.POLLOUT)
        while True:
            # One socket is registered, so that there is one entry.
            ready = either.poll()[0][1]
            is_writable = ready & select.POLLOUT
            is_readable = ready & select.POLLIN
            if is_writable and not is_readable:
                return
            # Also after a hang-up, which then shows as an error of reading.
            self._take_answer()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Hangs up after a frame that is sent or received in part. The bytes after a part of a frame are no frame."""
        if not self.is_open:
            raise Unanswered("the connection is closed")
        try:
            yield
        except BaseException as error:
            self.close()
            if isinstance(error, frames.BROKEN):
                raise Unanswered(str(error)) from error
            raise

    def forget(self) -> None:
        """Drops the answers to all packets sent so far."""
        self._oldest = self._next
        self._came.clear()

    def close(self) -> None:
        """Hangs up."""
        self.is_open = False
        self._connection.close()


class Reconnection:
    """Sends packets over a further connection to the same server, in place of one that is broken. Not thread-safe."""

    def __init__(self, address: Address) -> None:
        """Connects at the first packet."""
        self._address = address
        self._client: PacketClient | None = None

    def send(self, packet: Packet) -> PendingAnswer:
        """Sends a packet, as `PacketClient.send` does.

        Raises:
            TrunkLost: The server cannot be reached any more.
        """
        if self._client is None or not self._client.is_open:
            try:
                self._client = PacketClient(self._address)
            except OSError as error:
                raise TrunkLost(f"the trunk cannot be reached any more ({error.strerror or error})") from error
        return self._client.send(packet)

    def forget(self) -> None:
        """Drops the answers to all packets sent so far."""
        if self._client is not None:
            self._client.forget()
