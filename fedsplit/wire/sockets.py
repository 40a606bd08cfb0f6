"""Packets over a socket between processes of one machine, without a detour.

A call of a Ray actor with a packet of the bundled model takes 2 ms, and 3 to 4 where either side has computed for a
while, since it passes through some ten threads; over a socket it takes 0.2 to 0.7. What is sent is described in JSON
and followed by the bytes of its arrays: nothing is unpickled.

A frame: its number (8 bytes) and the length of its header (4), little-endian; the header; the arrays in the order in
which the header names them. A server is asked with the number of a call, and answers with the same: a packet, or what
is wrong with the one that came.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import math
import os
import queue
import secrets
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from fedsplit.wire.packets import Encoded, Packet, StepKey, check_form, may_cross
from fedsplit.wire.steps import RefusedStep

_PREFIX = struct.Struct("<QI")
_LONGEST_HEADER = 2**16
_LONGEST_WORDS = 2**12
_LARGEST_ARRAY = 2**34
_GREETING_SECONDS = 10.0
_PAUSE_SECONDS = 0.1
MOST_UNREAD = 64
"""Packets of one connection that may be without an answer that has been read: as many as a step has parts, and more."""

MOST_UNREAD_BYTES = 64 * 2**20
"""Bytes of these packets and answers; `_ALWAYS` packets may be larger."""

_ALWAYS = 2
"""Packets that may be under way whatever their size, so that client and trunk work at the same time."""

_BROKEN = (OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, RecursionError, MemoryError)
"""Errors that reading a frame ends with where the other side has hung up, or what came is no frame."""


class Unanswered(Exception):
    """No answer came, and none will: the connection is broken."""


class TrunkFailed(Exception):
    """The trunk could not serve a packet, for another reason than that it must not; with what it said."""


def _kind_of_error(name: str) -> type[Exception]:
    """The refusal of that name; of anything else that was raised only the words are taken."""
    known = list(RefusedStep.__subclasses__())
    for refusal in known:  # grows: a subclass has subclasses
        known += refusal.__subclasses__()
    return {refusal.__name__: refusal for refusal in known}.get(name, TrunkFailed)


@dataclass(frozen=True)
class Address:
    """Where a server listens, and what it must be told first.

    Attributes:
        name: Of the socket, in Linux's abstract namespace, where nothing is left behind whatever becomes of a process.
        token: Without it the server hangs up.
    """

    name: str
    token: bytes


def is_possible() -> bool:
    """Whether this system has such sockets."""
    return sys.platform == "linux"


def _user_of(connection: socket.socket) -> int:
    """Whose process is at the other end."""
    credentials = struct.Struct("3i")  # process, user, group
    found: int = credentials.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size))[1]
    return found


def _place(address: Address) -> str:
    return "\0" + address.name


def _bytes_of(array: np.ndarray) -> memoryview:
    """The memory of a contiguous array, of any shape."""
    return memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]  # it is one from Python 3.12 on


def _header(packet: Packet) -> dict[str, Any]:
    plain = {field.name: getattr(packet, field.name) for field in fields(Packet)}
    arrays = {name: (e.data.dtype.str, e.data.shape, e.dtype, e.scale) for name, e in packet.tensors.items()}
    return {**plain, "key": vars(packet.key), "tensors": arrays}


def _send(
    connection: socket.socket, number: int, message: Packet | Exception, meanwhile: Callable[[], None] | None = None
) -> None:
    """Sends a frame.

    Args:
        connection: To whom.
        number: Of the call.
        message: A packet, or what is wrong with the one that came.
        meanwhile: Called where the connection takes no more at the moment, to return once it does; without it, this
            waits.
    """
    if isinstance(message, Exception):
        header, arrays = {"error": type(message).__name__, "words": str(message)[:_LONGEST_WORDS]}, []
    else:
        header = _header(message)
        arrays = [np.ascontiguousarray(encoded.data) for encoded in message.tensors.values()]
    text = json.dumps(header).encode()
    left = [memoryview(_PREFIX.pack(number, len(text)) + text), *(_bytes_of(array) for array in arrays)]
    while left:
        try:
            sent = connection.sendmsg(left, [], socket.MSG_DONTWAIT if meanwhile else 0)
        except BlockingIOError:
            assert meanwhile is not None
            meanwhile()
            continue
        while left and sent >= len(left[0]):
            sent -= len(left.pop(0))
        if left:
            left[0] = left[0][sent:]


def _fill(connection: socket.socket, memory: memoryview) -> None:
    while memory:
        if not (count := connection.recv_into(memory)):
            raise EOFError
        memory = memory[count:]


def _read(connection: socket.socket, count: int) -> bytes:
    memory = bytearray(count)
    _fill(connection, memoryview(memory))
    return bytes(memory)


def _receive(connection: socket.socket) -> tuple[int, Packet | Exception]:
    """A frame: its number, and the packet or the exception.

    Raises:
        EOFError: The other side has hung up.
        Others of `_BROKEN`: What came is no frame.
    """
    number, length = _PREFIX.unpack(_read(connection, _PREFIX.size))
    if length > _LONGEST_HEADER:
        raise ValueError("a header is too long")
    header = json.loads(_read(connection, length))
    if "error" in header:
        return number, _kind_of_error(header["error"])(str(header["words"]))
    empty = {name: _empty(*form) for name, form in header["tensors"].items()}
    plain = {**header, "key": StepKey(**header["key"]), "tensors": empty, "shape": tuple(header["shape"])}
    packet = Packet(**plain)
    check_form(packet)  # before anything is taken in that nobody can use
    for encoded in packet.tensors.values():
        _fill(connection, _bytes_of(encoded.data))
    return number, packet


def _empty(kind: str, shape: list[int], dtype: str, scale: float) -> Encoded:
    """Makes room for an array that a header announces.

    Raises:
        ValueError, TypeError: It is of a type or size that does not cross.
    """
    form = np.dtype(str(kind))
    if not may_cross(form) or math.prod(shape) * form.itemsize > _LARGEST_ARRAY:
        raise ValueError("an array is of a type or size that does not cross")
    return Encoded(np.empty(shape, form), dtype, scale)


class _Outbox:
    """Answers of one connection on their way out, and how much of it is unread.

    A client that asks and does not read would have answers pile up without end. So no more is read from it while
    too much of what it has asked is unanswered or unread; it is then held up where it sends.
    """

    def __init__(self) -> None:
        """Nothing is under way."""
        self._answers: queue.SimpleQueue[tuple[int, int, Packet | Exception] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._unread: dict[int, int] = {}
        self._taken = 0
        self._is_open = True

    def wait_for_room(self) -> bool:
        """Waits until another packet may be read; returns whether the connection is still open."""
        with self._changed:
            self._changed.wait_for(self._has_room)
            return self._is_open

    def _has_room(self) -> bool:
        unread = self._unread.values()
        is_small = len(unread) < MOST_UNREAD and sum(unread) < MOST_UNREAD_BYTES
        return not self._is_open or len(unread) < min(_ALWAYS, MOST_UNREAD) or is_small

    def take(self, nbytes: int) -> int:
        """Notes that a packet of so many bytes has come; returns what its answer is put with."""
        with self._changed:
            self._taken += 1
            self._unread[self._taken] = nbytes
            return self._taken

    def put(self, ticket: int, number: int, answer: Packet | Exception) -> None:
        """Puts the answer to a packet; it stands for the packet from now on, which is gone."""
        with self._changed:
            if self._is_open:
                self._unread[ticket] = answer.nbytes if isinstance(answer, Packet) else 0
                self._answers.put((ticket, number, answer))

    def get(self) -> tuple[int, int, Packet | Exception] | None:
        """Waits for an answer that is to be sent; None where the connection is closed."""
        return self._answers.get()

    def sent(self, ticket: int) -> None:
        """Notes that an answer has been read, or lies in the memory of the socket."""
        with self._changed:
            del self._unread[ticket]
            self._changed.notify()

    def close(self) -> None:
        """Ends what waits."""
        with self._changed:
            self._is_open = False
            self._changed.notify()
        self._answers.put(None)


class PacketServer:
    """Takes packets from whoever knows its address; each connection has a thread that reads, and one that answers.

    Attributes:
        address: Where it listens; to be told on a way that is safe.
        taken: Packets so far.
    """

    def __init__(self, serve: Callable[[Packet, Callable[[Packet | Exception], None]], None]) -> None:
        """Listens from now on, until the process ends.

        Args:
            serve: Takes a packet, and where its answer goes; called by many threads, must not wait.

        Raises:
            OSError: This process may not have such a socket.
        """
        self.address = Address(f"fedsplit-{secrets.token_hex(8)}", secrets.token_bytes(32))
        self.taken = 0
        self._serve = serve
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(_place(self.address))
        listener.listen()
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
                if _user_of(connection) != os.geteuid():
                    connection.close()
                    continue
                threading.Thread(target=self._attend, args=(connection,), daemon=True).start()
            except (OSError, RuntimeError):  # no more descriptors or threads: there may be some later
                time.sleep(_PAUSE_SECONDS)

    def _attend(self, connection: socket.socket) -> None:
        outbox = _Outbox()
        # Whoever breaks the rules, or is gone, is hung up on; the others do not notice.
        with connection, contextlib.suppress(*_BROKEN):
            connection.settimeout(_GREETING_SECONDS)
            if not hmac.compare_digest(_read(connection, len(self.address.token)), self.address.token):
                return
            connection.settimeout(None)
            threading.Thread(target=self._answer, args=(connection, outbox), daemon=True).start()
            try:
                while outbox.wait_for_room() and self._take_one(connection, outbox):
                    pass
            finally:
                outbox.close()

    def _take_one(self, connection: socket.socket, outbox: _Outbox) -> bool:
        """One packet; nothing of it is kept while the next one is waited for."""
        number, packet = _receive(connection)
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
        finally:  # whatever ended it: a client whose answer is lost must see that
            outbox.close()
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _answer_one(connection: socket.socket, outbox: _Outbox) -> bool:
        """One answer; nothing of it is kept while the next one is waited for."""
        if (item := outbox.get()) is None:
            return False
        ticket, number, answer = item
        _send(connection, number, answer)
        outbox.sent(ticket)
        return True


class PacketClient:
    """A connection to a `PacketServer`; used by one thread.

    Attributes:
        is_open: Whether it can still be used.
    """

    def __init__(self, address: Address) -> None:
        """Connects.

        Raises:
            OSError: Nobody listens there, as on any other machine.
        """
        self._connection = socket.socket(socket.AF_UNIX)
        try:
            self._connection.connect(_place(address))
            self._connection.sendall(address.token)
        except OSError:
            self._connection.close()
            raise
        self.is_open = True
        self._next = self._oldest = 0
        self._came: dict[int, Packet | Exception] = {}

    def send(self, packet: Packet) -> Callable[[], Packet]:
        """Sends a packet, and returns what waits for the answer, and may be called again.

        Raises:
            Unanswered: Here, or where the answer is waited for.
            RefusedStep, TrunkFailed: There alone: what the trunk raised.
        """
        number, self._next = self._next, self._next + 1
        with self._guarded():
            _send(self._connection, number, packet, self._make_way)
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
            raise Unanswered("the answer was wanted no more")
        while number not in self._came:
            with self._guarded():
                self._take_answer()
        return self._came.pop(number)

    def _take_answer(self) -> None:
        """Waits for the next answer that comes, whichever it is."""
        came, answer = _receive(self._connection)
        if came >= self._oldest:
            self._came[came] = answer

    def _make_way(self) -> None:
        """Takes in answers until the connection takes more: a server with too many unread ones reads no further."""
        either = select.poll()
        either.register(self._connection, select.POLLIN | select.POLLOUT)
        while not (ready := either.poll()[0][1]) & select.POLLOUT or ready & select.POLLIN:
            self._take_answer()

    @contextlib.contextmanager
    def _guarded(self) -> Any:
        """Hangs up where a frame was not sent or received to its end, whatever ended it: what follows is no frame."""
        if not self.is_open:
            raise Unanswered("the connection is closed")
        try:
            yield
        except BaseException as error:
            self.close()
            if isinstance(error, _BROKEN):
                raise Unanswered(str(error)) from error
            raise

    def forget(self) -> None:
        """Answers to what was sent so far are wanted no more."""
        self._oldest = self._next
        self._came.clear()

    def close(self) -> None:
        """Hangs up."""
        self.is_open = False
        self._connection.close()
