"""Packets over a socket between processes of one machine, without a detour.

A call of a Ray actor with a packet of the bundled model takes 2 ms, and 3 to 4 where either side has computed for a
while, since it passes through some ten threads; over a socket it takes 0.2 to 0.7. What is sent is described in JSON
and followed by the bytes of its arrays: nothing is unpickled.

A frame: its number (8 bytes) and the length of its header (4), little-endian; the header; the arrays in the order in
which the header names them. A server is asked with the number of a call, and answers with the same; a header without a
key says that there is no answer.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import math
import queue
import secrets
import socket
import struct
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from fedsplit.wire.packets import Encoded, Packet, StepKey

_PREFIX = struct.Struct("<QI")
_LONGEST_HEADER = 2**16
_LARGEST_ARRAY = 2**34
_GREETING_SECONDS = 10.0
_KINDS = "biuf"
"""Kinds of arrays that may cross: truth values, integers, floating point."""


class Unanswered(Exception):
    """No answer came, and none will: the other side could not give one, or is gone."""


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


def _place(address: Address) -> str:
    return "\0" + address.name


def _bytes_of(array: np.ndarray) -> memoryview:
    """The memory of a contiguous array, of any shape."""
    return memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]  # it is one from Python 3.12 on


def _header(packet: Packet) -> dict[str, Any]:
    plain = {field.name: getattr(packet, field.name) for field in fields(Packet)}
    arrays = {name: (e.data.dtype.str, e.data.shape, e.dtype, e.scale) for name, e in packet.tensors.items()}
    return {**plain, "key": vars(packet.key), "tensors": arrays}


def _send(connection: socket.socket, number: int, packet: Packet | None) -> None:
    header = json.dumps(None if packet is None else _header(packet)).encode()
    arrays = [] if packet is None else [np.ascontiguousarray(encoded.data) for encoded in packet.tensors.values()]
    left = [memoryview(_PREFIX.pack(number, len(header)) + header), *(_bytes_of(array) for array in arrays)]
    while left:
        sent = connection.sendmsg(left)
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


def _receive(connection: socket.socket) -> tuple[int, Packet | None]:
    """A frame: its number, and the packet, or None where there is none.

    Raises:
        EOFError: The other side has hung up.
        ValueError: What came is no frame.
    """
    number, length = _PREFIX.unpack(_read(connection, _PREFIX.size))
    if length > _LONGEST_HEADER:
        raise ValueError("a header is too long")
    header = json.loads(_read(connection, length))
    if header is None:
        return number, None
    tensors = {}
    for name, (kind, shape, dtype, scale) in header["tensors"].items():
        form = np.dtype(kind)
        if form.kind not in _KINDS or math.prod(shape) * form.itemsize > _LARGEST_ARRAY:
            raise ValueError("an array is of a type or size that does not cross")
        array = np.empty(shape, form)
        _fill(connection, _bytes_of(array))
        tensors[name] = Encoded(array, dtype, scale)
    plain = {**header, "key": StepKey(**header["key"]), "tensors": tensors, "shape": tuple(header["shape"])}
    return number, Packet(**plain)


class PacketServer:
    """Takes packets from whoever knows its address; each connection has a thread that reads, and one that answers.

    Attributes:
        address: Where it listens; to be told on a way that is safe.
        taken: Packets so far.
    """

    def __init__(self, serve: Callable[[Packet, Callable[[Packet | Exception], None]], None]) -> None:
        """Listens from now on, until the process ends.

        Args:
            serve: Takes a packet, and where its answer goes; called by many threads, must not wait. For an exception
                the client is told that there is no answer.
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
            connection, _ = listener.accept()
            threading.Thread(target=self._attend, args=(connection,), daemon=True).start()

    def _attend(self, connection: socket.socket) -> None:
        outbox: queue.SimpleQueue[tuple[int, Packet | Exception] | None] = queue.SimpleQueue()
        # Whoever breaks the rules, or is gone, is hung up on; the others do not notice.
        with connection, contextlib.suppress(OSError, EOFError, ValueError, TypeError, KeyError):
            connection.settimeout(_GREETING_SECONDS)
            if not hmac.compare_digest(_read(connection, len(self.address.token)), self.address.token):
                return
            connection.settimeout(None)
            threading.Thread(target=self._answer, args=(connection, outbox), daemon=True).start()
            try:
                while True:
                    number, packet = _receive(connection)
                    if packet is None:
                        return
                    self.taken += 1
                    self._serve(packet, lambda answer, number=number: outbox.put((number, answer)))  # type: ignore[misc]
            finally:
                outbox.put(None)

    @staticmethod
    def _answer(connection: socket.socket, outbox: queue.SimpleQueue[tuple[int, Packet | Exception] | None]) -> None:
        with contextlib.suppress(OSError):  # the client is gone
            while (item := outbox.get()) is not None:
                number, answer = item
                _send(connection, number, answer if isinstance(answer, Packet) else None)


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
        self._came: dict[int, Packet | None] = {}

    def send(self, packet: Packet) -> Callable[[], Packet]:
        """Sends a packet, and returns what waits for the answer.

        Raises:
            Unanswered: Here, or where the answer is waited for.
        """
        number, self._next = self._next, self._next + 1
        with self._guarded():
            _send(self._connection, number, packet)
        return lambda: self._wait(number)

    def _wait(self, number: int) -> Packet:
        while number not in self._came:
            with self._guarded():
                came, answer = _receive(self._connection)
            if came >= self._oldest:
                self._came[came] = answer
        answer = self._came.pop(number)
        if answer is None:
            raise Unanswered("there is no answer")
        return answer

    @contextlib.contextmanager
    def _guarded(self) -> Any:
        """Hangs up where a frame was not sent or received to its end, whatever ended it: what follows is no frame."""
        if not self.is_open:
            raise Unanswered("the connection is closed")
        try:
            yield
        except BaseException as error:
            self.close()
            if isinstance(error, OSError | EOFError | ValueError | TypeError | KeyError):
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
