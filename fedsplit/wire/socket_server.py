"""The server's side of packets over sockets: who may connect, and how much may be on the way.

Each client of the trunk has a connection with two threads, one that reads packets and one that sends answers. The
client's side is `fedsplit.wire.sockets`.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import queue
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from fedsplit.wire import frames, sockets
from fedsplit.wire.packets import Packet
from fedsplit.wire.sockets import FIRST, GREETING_SECONDS, WELCOME, Address, place, tune
from fedsplit.wire.tls import NotTrusted, SecureConnection
from fedsplit.wire.transport import Unanswered

_PAUSE_SECONDS = 0.1
"""Wait before the server accepts again, after the system had no descriptor or thread for a connection."""

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


def _user_of(connection: socket.socket) -> int:
    """Returns the id of the user of the peer's process."""
    credentials = struct.Struct("3i")  # process, user, group
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size)
    user: int = credentials.unpack(packed)[1]
    return user


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
        >>> from fedsplit.wire.sockets import PacketClient
        >>> server = PacketServer(lambda packet, done: done(packet))  # an echo
        >>> client = PacketClient(server.address)
        >>> packet = Packet(StepKey(round=1, client=0, step=0))
        >>> answer = client.send(packet)
        >>> answer() == packet
        True
        >>> client.close()
    """

    def __init__(
        self,
        serve: Callable[[Packet, Callable[[Packet | Exception], None]], None],
        host: str = "",
        tls: str = "",
    ) -> None:
        """Listens until the process ends.

        Args:
            serve: Called with a packet, and a function that takes the answer. Many threads call `serve`, and `serve`
                must not wait.
            host: IP address of this machine at which the server listens for other machines, too.
            tls: Folder with certificates, by which packets to and from other machines are encrypted; empty for none.

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
        if sockets.is_possible():
            on_this_machine = socket.socket(socket.AF_UNIX)
            on_this_machine.bind(place(self.address))
            listeners.append(on_this_machine)
        if host:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            from_afar = socket.create_server((host, 0), family=family)  # port 0: the system chooses a free port
            port = from_afar.getsockname()[1]
            self.address = replace(self.address, host=host, port=port, tls=tls)
            listeners.append(from_afar)
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
        # Names in the abstract namespace have no permissions: any user of the machine may connect.
        is_foreign = is_local and _user_of(connection) != os.geteuid()
        if not is_local:
            tune(connection)
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
        with connection, contextlib.suppress(*frames.BROKEN, NotTrusted):
            try:
                stream = self._greeted(connection)
            finally:
                self._strangers.release()  # no stranger any more, or gone
            if stream is None:
                return
            if not self._places.acquire(blocking=False):
                words = f"the trunk has {self._most} connections, and takes no more"
                frames.send(stream, FIRST, Unanswered(words))
                return
            try:
                self._converse(connection, stream)
            finally:
                self._places.release()

    def _greeted(self, connection: socket.socket) -> frames.Connection | None:
        """Waits for the token, and returns the connection as bytes pass: encrypted or not. None for a wrong token.

        Raises:
            NotTrusted: The client has no certificate that this machine accepts.
            OSError: The client is gone, or silent for too long.
        """
        stream: frames.Connection = connection
        connection.settimeout(GREETING_SECONDS)
        if self.address.tls and connection.family != socket.AF_UNIX:
            stream = SecureConnection(connection, self.address.tls, is_server=True)
            stream.sendmsg([memoryview(WELCOME)])
        token = frames.read(stream, len(self.address.token))
        if not hmac.compare_digest(token, self.address.token):  # in constant time: a guess learns nothing
            return None
        connection.settimeout(None)  # a client may train for any time between two packets
        return stream

    def _converse(self, connection: socket.socket, stream: frames.Connection) -> None:
        """Takes packets until the client hangs up."""
        outbox = _Outbox()
        threading.Thread(target=self._answer, args=(connection, stream, outbox), daemon=True).start()
        try:
            while outbox.wait_for_room() and self._take_one(stream, outbox):
                pass
        finally:
            outbox.close()  # ends the answering thread

    def _take_one(self, stream: frames.Connection, outbox: _Outbox) -> bool:
        """Takes one packet.

        A loop in here would keep the last packet in memory while the thread waits for the next packet.
        """
        number, packet = frames.receive(stream)
        if isinstance(packet, Exception):
            return False
        self.taken += 1
        ticket = outbox.take(packet.nbytes)
        self._serve(packet, lambda answer: outbox.put(ticket, number, answer))
        return True

    def _answer(self, connection: socket.socket, stream: frames.Connection, outbox: _Outbox) -> None:
        """Sends answers to the end of the connection."""
        try:
            while self._answer_one(stream, outbox):
                pass
        except OSError:
            pass  # the client is gone
        finally:  # after any error, the client must notice that the answer is lost
            outbox.close()
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _answer_one(stream: frames.Connection, outbox: _Outbox) -> bool:
        """Sends one answer.

        A loop in here would keep the last answer in memory while the thread waits for the next answer.
        """
        item = outbox.get()
        if item is None:
            return False
        ticket, number, answer = item
        frames.send(stream, number, answer)
        outbox.sent(ticket)
        return True
