"""Sockets as transport: packets between processes of one machine or of two, without a detour.

A call of a Ray actor with a packet of the bundled model passes through some ten threads, and takes 2 ms, or 3 to 4 ms
between processes that have just computed. A packet over a socket takes 0.2 to 0.7 ms.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import queue
import secrets
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from fedsplit.wire import frames
from fedsplit.wire.packets import Packet
from fedsplit.wire.transport import PendingAnswer, Unanswered

_GREETING_SECONDS = 10.0
_PAUSE_SECONDS = 0.1

_FIRST = 0
"""Number of a client's first packet."""

MOST_UNREAD = 64
"""Most packets of one connection without an answer that the client has read. A step has fewer parts."""

MOST_UNREAD_BYTES = 64 * 2**20
"""Most bytes of unread packets and answers of one connection. `_ALWAYS` packets may be larger."""

_MOST_STRANGERS = 64
"""Most connections at once that have not sent the token yet. Further connections are closed."""

MOST_CONNECTIONS = 512
"""Most connections at once that have sent the token. Each process that plays clients has one, which takes two threads.

The first packet of a further connection is answered by `Unanswered`, so that the packet can go another way.
"""

_ALWAYS = 2
"""Packets of any size that may be on the way at once, so that client and trunk can work at the same time."""


@dataclass(frozen=True)
class Address:
    """Address of a server, with the server's token.

    Attributes:
        name: Name of the socket in Linux's abstract namespace. The end of the process leaves no file behind.
        token: First bytes that a client sends. Without the token, the server hangs up.
        host: IP address by which other machines reach the server; empty if no other machine may.
        port: TCP port of the server.
    """

    name: str
    token: bytes
    host: str = ""
    port: int = 0


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
            connection.connect(_place(address))
        except OSError:  # the server is on another machine, or gone
            connection.close()
            if not address.host:
                raise
        else:
            return connection
    connection = socket.create_connection((address.host, address.port), _GREETING_SECONDS)
    connection.settimeout(None)
    _tune(connection)
    return connection


def _tune(connection: socket.socket) -> None:
    """Has TCP send packets at once, and notice within half a minute that a machine is gone."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):  # not every system has these options
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _user_of(connection: socket.socket) -> int:
    """Returns the id of the user of the peer's process."""
    credentials = struct.Struct("3i")  # process, user, group
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size)
    user: int = credentials.unpack(packed)[1]
    return user


def _place(address: Address) -> str:
    return "\0" + address.name


class _Outbox:
    """Queue of the answers of one connection, with a limit for unread packets and answers.

    Answers to a client that never reads would pile up without end. So the server stops reading from a client with too
    many unread packets and answers, and the client's next send waits.
    """

    def __init__(self) -> None:
        """Starts empty."""
        self._answers: queue.SimpleQueue[tuple[int, int, Packet | Exception] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._unread: dict[int, int] = {}
        self._taken = 0
        self._is_open = True

    def wait_for_room(self) -> bool:
        """Waits until a further packet may be read. Returns False after the end of the connection."""
        with self._changed:
            self._changed.wait_for(self._has_room)
            return self._is_open

    def _has_room(self) -> bool:
        """Returns True if a further packet may be read, or if there is nothing to wait for."""
        if not self._is_open:
            return True
        unread = self._unread.values()
        if len(unread) < min(_ALWAYS, MOST_UNREAD):
            return True
        return len(unread) < MOST_UNREAD and sum(unread) < MOST_UNREAD_BYTES

    def take(self, nbytes: int) -> int:
        """Notes the arrival of a packet with a number of bytes. Returns a ticket for the answer."""
        with self._changed:
            self._taken += 1
            self._unread[self._taken] = nbytes
            return self._taken

    def put(self, ticket: int, number: int, answer: Packet | Exception) -> None:
        """Queues the answer to a packet. From now on, the answer's bytes count in place of the packet's bytes."""
        with self._changed:
            if self._is_open:
                self._unread[ticket] = answer.nbytes if isinstance(answer, Packet) else 0
                self._answers.put((ticket, number, answer))

    def get(self) -> tuple[int, int, Packet | Exception] | None:
        """Waits for the next answer to send. Returns None after the end of the connection."""
        return self._answers.get()

    def sent(self, ticket: int) -> None:
        """Notes that an answer was read, or lies in the buffer of the socket."""
        with self._changed:
            del self._unread[ticket]
            self._changed.notify()

    def close(self) -> None:
        """Ends all waits."""
        with self._changed:
            self._is_open = False
            self._changed.notify()
        self._answers.put(None)


class PacketServer:
    """Takes packets from clients that know the address. Each connection has a reading and an answering thread.

    Attributes:
        address: Address of the server, with a secret token. Pass the address to clients on a safe way.
        taken: Number of packets so far.

    Example:
        >>> from fedsplit.wire.packets import StepKey
        >>> server = PacketServer(lambda packet, done: done(packet))  # an echo
        >>> client = PacketClient(server.address)
        >>> packet = Packet(StepKey(round=1, client=0, step=0))
        >>> answer = client.send(packet)
        >>> answer() == packet
        True
        >>> client.close()
    """

    def __init__(self, serve: Callable[[Packet, Callable[[Packet | Exception], None]], None], host: str = "") -> None:
        """Listens until the process ends.

        Args:
            serve: Called with a packet, and a function that takes the answer. Many threads call `serve`, and `serve`
                must not wait.
            host: IP address of this machine at which the server listens for other machines, too. The packets are not
                encrypted on their way.

        Raises:
            OSError: This process may not open a socket.
        """
        self.address = Address(f"fedsplit-{secrets.token_hex(8)}", secrets.token_bytes(32))
        self.taken = 0
        self._serve = serve
        self._strangers = threading.BoundedSemaphore(_MOST_STRANGERS)
        self._most = MOST_CONNECTIONS
        self._places = threading.BoundedSemaphore(self._most)
        listeners = []
        if is_possible():
            listeners.append(socket.socket(socket.AF_UNIX))
            listeners[-1].bind(_place(self.address))
        if host:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listeners.append(socket.create_server((host, 0), family=family))
            self.address = replace(self.address, host=host, port=listeners[-1].getsockname()[1])
        for listener in listeners:
            listener.listen()
            accepting = threading.Thread(target=self._accept, args=(listener,), daemon=True)
            accepting.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
                self._admit(connection)
            except (OSError, RuntimeError):  # no descriptor or thread is free; some may be free later
                time.sleep(_PAUSE_SECONDS)

    def _admit(self, connection: socket.socket) -> None:
        """Starts a thread for a connection. Closes a connection of a foreign user, or beyond `_MOST_STRANGERS`."""
        is_local = connection.family == socket.AF_UNIX
        is_foreign = is_local and _user_of(connection) != os.geteuid()
        if not is_local:
            _tune(connection)
        if is_foreign or not self._strangers.acquire(blocking=False):
            connection.close()
            return
        try:
            attending = threading.Thread(target=self._attend, args=(connection,), daemon=True)
            attending.start()
        except RuntimeError:
            self._strangers.release()
            connection.close()
            raise

    def _attend(self, connection: socket.socket) -> None:
        """Reads from a connection to the end."""
        # The server hangs up on a client that breaks the rules or is gone. Further clients do not notice.
        with connection, contextlib.suppress(*frames.BROKEN):
            try:
                connection.settimeout(_GREETING_SECONDS)
                token = frames.read(connection, len(self.address.token))
                if not hmac.compare_digest(token, self.address.token):  # in constant time: a guess learns nothing
                    return
                connection.settimeout(None)
            finally:
                self._strangers.release()
            if not self._places.acquire(blocking=False):
                words = f"the trunk has {self._most} connections, and takes no more"
                frames.send(connection, _FIRST, Unanswered(words))
                return
            try:
                self._converse(connection)
            finally:
                self._places.release()

    def _converse(self, connection: socket.socket) -> None:
        """Takes packets until the client hangs up."""
        outbox = _Outbox()
        threading.Thread(target=self._answer, args=(connection, outbox), daemon=True).start()
        try:
            while outbox.wait_for_room() and self._take_one(connection, outbox):
                pass
        finally:
            outbox.close()

    def _take_one(self, connection: socket.socket, outbox: _Outbox) -> bool:
        """Takes one packet.

        A loop in here would keep the last packet in memory while the thread waits for the next packet.
        """
        number, packet = frames.receive(connection)
        if isinstance(packet, Exception):
            return False
        self.taken += 1
        ticket = outbox.take(packet.nbytes)
        self._serve(packet, lambda answer: outbox.put(ticket, number, answer))
        return True

    def _answer(self, connection: socket.socket, outbox: _Outbox) -> None:
        """Sends answers to the end of the connection."""
        try:
            while self._answer_one(connection, outbox):
                pass
        except OSError:
            pass  # the client is gone
        finally:  # after any error, the client must notice that the answer is lost
            outbox.close()
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _answer_one(connection: socket.socket, outbox: _Outbox) -> bool:
        """Sends one answer.

        A loop in here would keep the last answer in memory while the thread waits for the next answer.
        """
        item = outbox.get()
        if item is None:
            return False
        ticket, number, answer = item
        frames.send(connection, number, answer)
        outbox.sent(ticket)
        return True


class PacketClient:
    """A connection to a `PacketServer`. Not thread-safe.

    Attributes:
        is_open: False once the connection is broken or closed.
    """

    def __init__(self, address: Address) -> None:
        """Connects to a server.

        Raises:
            OSError: No server that this machine can reach listens at the address.
        """
        self._connection = _connected(address)
        try:
            self._connection.sendall(address.token)
        except OSError:
            self._connection.close()
            raise
        self.is_open = True
        self._next = _FIRST
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
            frames.send(self._connection, number, packet, self._make_way)
        known: list[Packet | Exception] = []

        def wait() -> Packet:
            if not known:
                known.append(self._wait(number))
            if isinstance(known[0], Exception):
                raise known[0]
            return known[0]

        return wait

    def _wait(self, number: int) -> Packet | Exception:
        if number < self._oldest:
            raise Unanswered("the answer was dropped by `forget`")
        while number not in self._came:
            with self._guarded():
                self._take_answer()
        return self._came.pop(number)

    def _take_answer(self) -> None:
        """Waits for the next answer to any packet."""
        came, answer = frames.receive(self._connection)
        if came >= self._oldest:
            self._came[came] = answer

    def _make_way(self) -> None:
        """Reads answers until the connection takes more bytes.

        A server with too many unread answers stops reading. A client that only sent would then wait for ever.
        """
        either = select.poll()
        either.register(self._connection, select.POLLIN | select.POLLOUT)
        while True:
            ready = either.poll()[0][1]
            is_writable = ready & select.POLLOUT
            is_readable = ready & select.POLLIN
            if is_writable and not is_readable:
                return
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
