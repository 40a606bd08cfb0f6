"""Frames: packets as bytes on a socket. A header in JSON is followed by the bytes of the arrays. Nothing is unpickled.

A frame consists of a number (8 bytes) and the length of the header (4), little-endian; the header; and the arrays, in
the order of the header. An answer has the number of the request, and holds a packet or an error.
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
import struct
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeVar

import numpy as np

from fedsplit.wire.encoded import Encoded, Fact, is_count, may_cross
from fedsplit.wire.packets import Packet, StepKey, check_form
from fedsplit.wire.steps import RefusedStep
from fedsplit.wire.transport import Unanswered

T = TypeVar("T")

_PREFIX = struct.Struct("<QI")
_PAUSE = struct.Struct("@ll")  # the system's `timeval`: seconds and microseconds, in native sizes
_LONGEST_HEADER = 2**16
_LONGEST_WORDS = 2**12  # a character takes up to 12 bytes as JSON, so the words fit into a header

LARGEST_PACKET = 2**34
"""Most bytes of all arrays of a packet together. The system gives memory as bytes arrive, not on announcement."""

LONGEST_PAUSE = 600.0
"""Longest pause within a frame in seconds. Between frames, a connection may be silent for ever."""

BROKEN = (OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, RecursionError, MemoryError)
"""Errors of `receive` after the peer has hung up, or for bytes that are no frame."""


class Connection(Protocol):
    """A connection to a peer: a socket, or a `fedsplit.wire.tls.SecureConnection`."""

    def recv_into(self, memory: memoryview, /) -> int:
        """Waits for bytes, and writes them into memory; returns how many, and 0 at the end."""
        ...

    def sendmsg(
        self,
        pieces: list[memoryview],
        ancillary: list[Any] = ...,
        flags: int = ...,
        /,
    ) -> int:
        """Sends the first bytes of some pieces of memory; returns how many."""
        ...

    def setsockopt(self, level: int, option: int, value: bytes, /) -> None:
        """Sets an option of the socket."""
        ...


class TrunkFailed(Exception):
    """The trunk could not serve a packet, for a reason that is no refusal. The message is the trunk's message."""


def error_named(name: str) -> type[Exception]:
    """Returns the refusal with a name, or `TrunkFailed` for any other name.

    Only refusals and `Unanswered` are looked up: a name from the wire must not choose any class of the program.

    Example:
        >>> error_named("StaleStep").__name__, error_named("SystemExit").__name__
        ('StaleStep', 'TrunkFailed')
    """
    refusals: list[type[Exception]] = [Unanswered, *RefusedStep.__subclasses__()]
    for refusal in refusals:  # the list grows during the loop, by subclasses of subclasses
        refusals += refusal.__subclasses__()
    by_name = {refusal.__name__: refusal for refusal in refusals}
    return by_name.get(name, TrunkFailed)


def _bytes_of(array: np.ndarray) -> memoryview:
    """Returns the memory of a contiguous array of any shape."""
    # As bytes: a slice of any other view would count elements, and a socket counts bytes.
    return memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]  # it is one from Python 3.12 on


def header_of(packet: Packet) -> dict[str, Any]:
    """Returns the header of a packet's frame.

    Example:
        >>> packet = Packet(StepKey(round=1, client=0, step=0), {"mask": Encoded({"values": np.ones((2, 3), bool)})})
        >>> header_of(packet)["tensors"]
        {'mask': {'arrays': {'values': ['|b1', (2, 3)]}, 'header': {}}}
    """
    plain = {field.name: getattr(packet, field.name) for field in fields(Packet)}
    tensors = {}
    for name, encoded in packet.tensors.items():
        forms = {inner: [array.dtype.str, array.shape] for inner, array in encoded.arrays.items()}
        tensors[name] = {"arrays": forms, "header": dict(encoded.header)}
    return {**plain, "key": vars(packet.key), "tensors": tensors}


def _as_text(header: Mapping[str, Any]) -> bytes:
    """Returns a header as it stands in a frame."""
    return json.dumps(header).encode()


def framing(packet: Packet) -> int:
    """Returns the bytes of a packet's frame without the arrays.

    Example:
        >>> empty = Packet(StepKey(round=1, client=0, step=0))
        >>> with_mask = Packet(empty.key, {"mask": Encoded({"values": np.ones((2, 3), bool)}, {"dtype": "bool"})})
        >>> framing(with_mask) - framing(empty), with_mask.nbytes
        (76, 6)
    """
    return _PREFIX.size + len(_as_text(header_of(packet)))


def pieces_of(number: int, message: Packet | Exception) -> list[memoryview]:
    """Returns a frame as pieces of memory. The memory of the arrays is shared, and not copied.

    Args:
        number: Number of the request.
        message: A packet, or the error in place of an answer.

    Example:
        >>> packet = Packet(StepKey(round=1, client=0, step=0), {"mask": Encoded({"values": np.ones((2, 3), bool)})})
        >>> [len(piece) for piece in pieces_of(7, packet)] == [framing(packet), 6]
        True
    """
    header: dict[str, Any]
    arrays: list[np.ndarray] = []
    if isinstance(message, Exception):
        # The name and the words only: an exception object would have to be pickled.
        header = {"error": type(message).__name__, "words": str(message)[:_LONGEST_WORDS]}
    else:
        header = header_of(message)
        for encoded in message.tensors.values():
            arrays += [np.ascontiguousarray(array) for array in encoded.arrays.values()]

    text = _as_text(header)
    prefix = _PREFIX.pack(number, len(text))
    # Pieces of memory, and no joined bytes: a copy of the arrays would double the memory of a packet.
    return [memoryview(prefix + text), *(_bytes_of(array) for array in arrays)]


def send(
    connection: Connection, number: int, message: Packet | Exception, meanwhile: Callable[[], None] | None = None
) -> None:
    """Sends a frame.

    Args:
        connection: Connection to the peer.
        number: Number of the request.
        message: A packet, or the error in place of an answer.
        meanwhile: Called whenever the connection takes no more bytes. Returns once the connection takes bytes again.
            Without `meanwhile`, this function waits.
    """
    left = pieces_of(number, message)
    while left:
        try:
            sent = connection.sendmsg(left, [], socket.MSG_DONTWAIT if meanwhile else 0)
        except BlockingIOError:
            assert meanwhile is not None
            meanwhile()
            continue
        _drop_sent(left, sent)


def _drop_sent(left: list[memoryview], sent: int) -> None:
    """Removes a number of sent bytes from the beginning of some pieces of memory."""
    # `>=`, so that pieces without bytes leave, too. A frame with one at its end would otherwise be sent for ever.
    while left and sent >= len(left[0]):
        sent -= len(left.pop(0))
    if left:
        left[0] = left[0][sent:]


def _fill(connection: Connection, memory: memoryview) -> None:
    """Reads bytes until a piece of memory is full."""
    while memory:
        count = connection.recv_into(memory)
        if not count:
            raise EOFError
        memory = memory[count:]


def read(connection: Connection, count: int) -> bytes:
    """Reads a number of bytes.

    Raises:
        EOFError: The peer has hung up.
    """
    memory = bytearray(count)
    _fill(connection, memoryview(memory))
    return bytes(memory)


def receive(connection: Connection) -> tuple[int, Packet | Exception]:
    """Waits for a frame.

    Returns:
        The number of the frame, and the packet or the error in the frame.

    Raises:
        EOFError: The peer has hung up.
        Any error in `BROKEN`: The bytes are no frame.
    """
    parts = reading()
    _fill(connection, next(parts))
    memory = next(parts)  # raises an error for a header that is too long
    # From the prefix on. Before a frame begins, the peer may be silent for any time.
    with _without_long_pauses(connection):
        while True:
            _fill(connection, memory)
            try:
                memory = next(parts)
            except StopIteration as end:
                frame: tuple[int, Packet | Exception] = end.value
                return frame


@contextlib.contextmanager
def _without_long_pauses(connection: Connection) -> Iterator[None]:
    """Makes reading fail after a pause of `LONGEST_PAUSE` seconds."""
    seconds, fraction = divmod(LONGEST_PAUSE, 1)
    # Not `settimeout`, which would limit the sending of answers by a second thread, too.
    pause = _PAUSE.pack(int(seconds), int(fraction * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, pause)
    try:
        yield
    finally:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _PAUSE.pack(0, 0))


Reading = Generator[memoryview, None, T]
"""Yields pieces of memory that the caller fills with the bytes of a message, one after another. Returns the message."""


def reading(largest: int | None = None) -> Reading[tuple[int, Packet | Exception]]:
    """Reads a frame from bytes that the caller has.

    Args:
        largest: Most bytes of all arrays; None for `LARGEST_PACKET`.

    Yields:
        Pieces of memory to fill: the prefix, the header, and each array's own memory.

    Returns:
        The number of the frame, and the packet or the error in the frame.

    Raises:
        Any error in `BROKEN`: The bytes are no frame.
    """
    most = LARGEST_PACKET if largest is None else largest
    prefix = bytearray(_PREFIX.size)
    yield memoryview(prefix)
    number, length = _PREFIX.unpack(prefix)
    if length > _LONGEST_HEADER:
        raise ValueError("a header is too long")

    text = bytearray(length)
    yield memoryview(text)
    header = json.loads(text)
    if "error" in header:
        return number, error_named(header["error"])(str(header["words"]))

    forms = {name: _forms(tensor["arrays"]) for name, tensor in header["tensors"].items()}
    nbytes = sum(form.nbytes for arrays in forms.values() for form in arrays.values())
    # Before memory is taken for the arrays.
    if nbytes > most:
        raise ValueError("a packet is too large")

    tensors = {}
    for name, arrays in forms.items():
        tensors[name] = _empty(arrays, header["tensors"][name]["header"])
    key = StepKey(**header["key"])
    shape = tuple(header["shape"])
    packet = Packet(**{**header, "key": key, "tensors": tensors, "shape": shape})
    check_form(packet)  # before the arrays: no bytes are read for a packet that nobody can use
    for encoded in tensors.values():
        for array in encoded.arrays.values():
            yield _bytes_of(array)  # into the array itself: no copy of the bytes
    return number, packet


@dataclass(frozen=True)
class _Form:
    """Type and shape of an array in a header."""

    dtype: np.dtype
    shape: list[int]

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize


def _forms(arrays: Mapping[str, Sequence[Any]]) -> dict[str, _Form]:
    """Returns the forms of the arrays in a header.

    Raises:
        ValueError, TypeError: An array has a type or shape that may not cross.
    """
    forms = {}
    for name, (kind, shape) in arrays.items():
        # As a text, since `np.dtype` takes None and lists for types, too.
        dtype = np.dtype(str(kind))
        is_shape = type(shape) is list and all(map(is_count, shape))
        if not may_cross(dtype) or not is_shape:
            raise ValueError("an array is of a type or shape that may not cross")
        forms[name] = _Form(dtype, shape)
    return forms


def _empty(arrays: Mapping[str, _Form], header: Mapping[str, Any]) -> Encoded:
    """Allocates arrays, and reads the facts of a tensor's header."""
    allocated = {name: np.empty(form.shape, form.dtype) for name, form in arrays.items()}
    facts: dict[str, Fact] = {}
    for name, fact in header.items():
        facts[name] = tuple(fact) if isinstance(fact, list) else fact  # JSON has no tuples
    return Encoded(allocated, facts)
