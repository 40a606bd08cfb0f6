"""A local socket as transport: packets between processes of one machine, without a detour.

A call of a Ray actor with a packet of the bundled model takes 2 ms, and 3 to 4 where either side has computed for a
while, since it passes through some ten threads. Over a socket it takes 0.2 to 0.7 ms.
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
from dataclasses import dataclass

from fedsplit.wire import frames
from fedsplit.wire.packets import Packet
from fedsplit.wire.transport import PendingAnswer, Unanswered

_GREETING_SECONDS = 10.0
_PAUSE_SECONDS = 0.1

_FIRST = 0
"""Number of a client's first packet."""

MOST_UNREAD = 64
"""Most packets of one connection whose answers have not been read; a step has fewer parts."""

MOST_UNREAD_BYTES = 64 * 2**20
"""Most bytes of these packets and answers; `_ALWAYS` packets may be larger."""

_MOST_STRANGERS = 64
"""Most connections at once that have not sent the token yet; further ones are closed."""

MOST_CONNECTIONS = 512
"""Most connections at once that have sent the token: one for each process that plays clients, and two threads each.

The answer to the first packet of a further one is `Unanswered`, and that packet can go another way.
"""

_ALWAYS = 2
"""Packets that may be under way whatever their size, so that client and trunk can work at the same time."""


@dataclass(frozen=True)
class Address:
    """Address of a server, with the token that it asks for.

    Attributes:
        name: Name of the socket in Linux's abstract namespace, where nothing is left behind when a process ends.
        token: First bytes that a client sends; without them the server hangs up.
    """

    name: str
    token: bytes


def is_possible() -> bool:
    """Returns True if this system has such sockets."""
    return sys.platform == "linux"


def _user_of(connection: socket.socket) -> int:
    """Returns the id of the user whose process is at the other end."""
    credentials = struct.Struct("3i")  # process, user, group
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size)
    user: int = credentials.unpack(found)[1]
    return user


def _place(address: Address) -> str:
    return "\0" + address.name


class _Outbox:
    """Queue of the answers of one connection, which knows how much of it is unread.

    Answers to a client that never reads would pile up without end. The server therefore stops reading from a client
    that has too many unanswered or unread packets; the client then waits where it sends.
    """

    def __init__(self) -> None:
        """Starts empty."""
        self._answers: queue.SimpleQueue[tuple[int, int, Packet | Exception] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._unread: dict[int, int] = {}
        self._taken = 0
        self._is_open = True

    def wait_for_room(self) -> bool:
        """Waits until another packet may be read; returns False if the connection was closed."""
        with self._changed:
            self._changed.wait_for(self._has_room)
            return self._is_open

    def _has_room(self) -> bool:
        unread = self._unread.values()
        is_small = len(unread) < MOST_UNREAD and sum(unread) < MOST_UNREAD_BYTES
        return not self._is_open or len(unread) < min(_ALWAYS, MOST_UNREAD) or is_small

    def take(self, nbytes: int) -> int:
        """Notes that a packet of so many bytes has come; returns a ticket for its answer."""
        with self._changed:
            self._taken += 1
            self._unread[self._taken] = nbytes
            return self._taken

    def put(self, ticket: int, number: int, answer: Packet | Exception) -> None:
        """Queues the answer to a packet, whose bytes count in place of the packet's from now on."""
        with self._changed:
            if self._is_open:
                self._unread[ticket] = answer.nbytes if isinstance(answer, Packet) else 0
                self._answers.put((ticket, number, answer))

    def get(self) -> tuple[int, int, Packet | Exception] | None:
        """Waits for the next answer to send; returns None if the connection was closed."""
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
    """Takes packets from clients that know its address. Each connection has a thread that reads and one that answers.

    Attributes:
        address: Address that it listens at; pass it to clients on a way that is safe.
        taken: Number of packets so far.

    Example:
        >>> from fedsplit.wire.packets import StepKey
        >>> server = PacketServer(lambda packet, done: done(packet))  # answers each packet by itself
        >>> client = PacketClient(server.address)
        >>> packet = Packet(StepKey(round=1, client=0, step=0))
        >>> answer = client.send(packet)
        >>> answer() == packet
        True
        >>> client.close()
    """

    def __init__(self, serve: Callable[[Packet, Callable[[Packet | Exception], None]], None]) -> None:
        """Listens until the process ends.

        Args:
            serve: Called with a packet and a function that takes its answer. It is called by many threads, and must
                not wait.

        Raises:
            OSError: This process may not have such a socket.
        """
        self.address = Address(f"fedsplit-{secrets.token_hex(8)}", secrets.token_bytes(32))
        self.taken = 0
        self._serve = serve
        self._strangers = threading.BoundedSemaphore(_MOST_STRANGERS)
        self._most = MOST_CONNECTIONS
        self._places = threading.BoundedSemaphore(self._most)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(_place(self.address))
        listener.listen()
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
                self._admit(connection)
            except (OSError, RuntimeError):  # no descriptor or thread is left: there may be one later
                time.sleep(_PAUSE_SECONDS)

    def _admit(self, connection: socket.socket) -> None:
        """Gives a connection its thread; closes one of another user, or one too many that has not sent the token."""
        if _user_of(connection) != os.geteuid() or not self._strangers.acquire(blocking=False):
            connection.close()
            return
        try:
            threading.Thread(target=self._attend, args=(connection,), daemon=True).start()
        except RuntimeError:
            self._strangers.release()
            connection.close()
            raise

    def _attend(self, connection: socket.socket) -> None:
        # The server hangs up on a client that breaks the rules or is gone; the others do not notice.
        with connection, contextlib.suppress(*frames.BROKEN):
            try:
                connection.settimeout(_GREETING_SECONDS)
                token = frames.read(connection, len(self.address.token))
                if not hmac.compare_digest(token, self.address.token):
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
        """Takes one packet; returning drops all references, so that nothing is kept while the thread waits."""
        number, packet = frames.receive(connection)
        if isinstance(packet, Exception):
            return False
        self.taken += 1
        ticket = outbox.take(packet.nbytes)
        self._serve(packet, lambda answer: outbox.put(ticket, number, answer))
        return True

    def _answer(self, connection: socket.socket, outbox: _Outbox) -> None:
        try:
            while self._answer_one(connection, outbox):
                pass
        except OSError:
            pass  # the client is gone
        finally:  # whatever the reason: a client must see that its answer is lost
            outbox.close()
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _answer_one(connection: socket.socket, outbox: _Outbox) -> bool:
        """Sends one answer; returning drops all references, so that nothing is kept while the thread waits."""
        if (item := outbox.get()) is None:
            return False
        ticket, number, answer = item
        frames.send(connection, number, answer)
        outbox.sent(ticket)
        return True


class PacketClient:
    """A connection to a `PacketServer`: the transport of packets on one machine. Used by one thread.

    Attributes:
        is_open: False once the connection is broken or closed.
    """

    def __init__(self, address: Address) -> None:
        """Connects to a server.

        Raises:
            OSError: No server listens at the address, as on any other machine.
        """
        self._connection = socket.socket(socket.AF_UNIX)
        try:
            self._connection.connect(_place(address))
            self._connection.sendall(address.token)
        except OSError:
            self._connection.close()
            raise
        self.is_open = True
        self._next = _FIRST
        self._oldest = 0
        self._came: dict[int, Packet | Exception] = {}

    def send(self, packet: Packet) -> PendingAnswer:
        """Sends a packet; the function that is returned waits for the answer, and may be called again.

        Raises:
            Unanswered: The connection is broken; here, or where the answer is waited for.
            RefusedStep, TrunkFailed: Where the answer is waited for: the error that the trunk raised.
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
        """Waits for the next answer, whichever packet it belongs to."""
        came, answer = frames.receive(self._connection)
        if came >= self._oldest:
            self._came[came] = answer

    def _make_way(self) -> None:
        """Reads answers until the connection takes more bytes: a server with too many unread answers stops reading."""
        either = select.poll()
        either.register(self._connection, select.POLLIN | select.POLLOUT)
        while not (ready := either.poll()[0][1]) & select.POLLOUT or ready & select.POLLIN:
            self._take_answer()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Hangs up if a frame is not sent or received to its end, since the bytes after it would be no frame."""
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
