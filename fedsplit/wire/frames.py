"""Frames: packets as bytes on a socket. A header in JSON, followed by the bytes of the arrays; nothing is unpickled.

A frame consists of its number (8 bytes) and the length of its header (4), little-endian; the header; and the arrays in
the order in which the header names them. An answer has the number of its request, and holds a packet or an error.
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from fedsplit.wire.encoded import Encoded, Fact, is_count, may_cross
from fedsplit.wire.packets import Packet, StepKey, check_form
from fedsplit.wire.steps import RefusedStep
from fedsplit.wire.transport import Unanswered

_PREFIX = struct.Struct("<QI")
_PAUSE = struct.Struct("@ll")
_LONGEST_HEADER = 2**16
_LONGEST_WORDS = 2**12

LARGEST_PACKET = 2**34
"""Most bytes of all arrays of a packet together. Memory is used up as bytes arrive, not as they are announced."""

LONGEST_PAUSE = 600.0
"""Seconds in which a frame that has begun must go on. Between frames a connection may be silent for ever."""

BROKEN = (OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, RecursionError, MemoryError)
"""Errors that `receive` raises where the other side has hung up, or where what came is no frame."""


class TrunkFailed(Exception):
    """The trunk could not serve a packet, for another reason than a refusal; with the trunk's words."""


def _error_named(name: str) -> type[Exception]:
    """Returns the refusal of that name, or `TrunkFailed` for anything else."""
    known: list[type[Exception]] = [Unanswered, *RefusedStep.__subclasses__()]
    for refusal in known:  # the list grows while it is read: a subclass has subclasses
        known += refusal.__subclasses__()
    return {refusal.__name__: refusal for refusal in known}.get(name, TrunkFailed)


def _bytes_of(array: np.ndarray) -> memoryview:
    """Returns the memory of a contiguous array of any shape."""
    return memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]  # it is one from Python 3.12 on


def header_of(packet: Packet) -> dict[str, Any]:
    """Returns the header of a packet's frame."""
    plain = {field.name: getattr(packet, field.name) for field in fields(Packet)}
    tensors = {
        name: {
            "arrays": {inner: [array.dtype.str, array.shape] for inner, array in encoded.arrays.items()},
            "header": dict(encoded.header),
        }
        for name, encoded in packet.tensors.items()
    }
    return {**plain, "key": vars(packet.key), "tensors": tensors}


def send(
    connection: socket.socket, number: int, message: Packet | Exception, meanwhile: Callable[[], None] | None = None
) -> None:
    """Sends a frame.

    Args:
        connection: Where to.
        number: Number of the request.
        message: A packet, or the error that it is answered by.
        meanwhile: Called whenever the connection takes no more bytes at the moment; returns once it does again. Where
            not given, this function waits itself.
    """
    header: dict[str, Any]
    arrays: list[np.ndarray] = []
    if isinstance(message, Exception):
        header = {"error": type(message).__name__, "words": str(message)[:_LONGEST_WORDS]}
    else:
        header = header_of(message)
        for encoded in message.tensors.values():
            arrays += [np.ascontiguousarray(array) for array in encoded.arrays.values()]
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
    """Reads bytes until a piece of memory is full."""
    while memory:
        if not (count := connection.recv_into(memory)):
            raise EOFError
        memory = memory[count:]


def read(connection: socket.socket, count: int) -> bytes:
    """Reads so many bytes.

    Raises:
        EOFError: The other side has hung up.
    """
    memory = bytearray(count)
    _fill(connection, memoryview(memory))
    return bytes(memory)


def receive(connection: socket.socket) -> tuple[int, Packet | Exception]:
    """Waits for a frame, and returns its number with the packet or the error that it holds.

    Raises:
        EOFError: The other side has hung up.
        Others of `BROKEN`: The bytes that came are no frame.
    """
    number, length = _PREFIX.unpack(read(connection, _PREFIX.size))
    if length > _LONGEST_HEADER:
        raise ValueError("a header is too long")
    with _without_long_pauses(connection):
        return number, _rest(connection, length)


@contextlib.contextmanager
def _without_long_pauses(connection: socket.socket) -> Iterator[None]:
    """Makes reading fail where no byte comes for `LONGEST_PAUSE` seconds. Sending, by other threads, is not limited."""
    seconds, fraction = divmod(LONGEST_PAUSE, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _PAUSE.pack(int(seconds), int(fraction * 1e6)))
    try:
        yield
    finally:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _PAUSE.pack(0, 0))


def _rest(connection: socket.socket, length: int) -> Packet | Exception:
    """Reads what follows the prefix of a frame.

    Args:
        connection: Where from.
        length: Bytes of the header.

    Raises:
        Others of `BROKEN`: The bytes that came are no frame, or stopped coming.
    """
    header = json.loads(read(connection, length))
    if "error" in header:
        return _error_named(header["error"])(str(header["words"]))

    forms = {name: _forms(tensor["arrays"]) for name, tensor in header["tensors"].items()}
    if sum(nbytes for arrays in forms.values() for _, _, nbytes in arrays.values()) > LARGEST_PACKET:
        raise ValueError("a packet is too large")
    tensors = {name: _empty(arrays, header["tensors"][name]["header"]) for name, arrays in forms.items()}
    plain = {**header, "key": StepKey(**header["key"]), "tensors": tensors, "shape": tuple(header["shape"])}
    packet = Packet(**plain)
    check_form(packet)  # before any bytes are read for a packet that nobody can use
    for encoded in tensors.values():
        for array in encoded.arrays.values():
            _fill(connection, _bytes_of(array))
    return packet


def _forms(arrays: Mapping[str, Sequence[Any]]) -> dict[str, tuple[np.dtype, list[int], int]]:
    """Returns type, shape and bytes of the arrays that a header announces.

    Raises:
        ValueError, TypeError: One is of a type or shape that may not cross.
    """
    forms = {}
    for name, (kind, shape) in arrays.items():
        form = np.dtype(str(kind))
        if not may_cross(form) or type(shape) is not list or not all(map(is_count, shape)):
            raise ValueError("an array is of a type or shape that may not cross")
        forms[name] = form, shape, math.prod(shape) * form.itemsize
    return forms


def _empty(arrays: Mapping[str, tuple[np.dtype, list[int], int]], header: Mapping[str, Any]) -> Encoded:
    """Allocates arrays of given forms, and reads the facts of a tensor's header."""
    allocated = {name: np.empty(shape, form) for name, (form, shape, _) in arrays.items()}
    facts: dict[str, Fact] = {name: tuple(fact) if isinstance(fact, list) else fact for name, fact in header.items()}
    return Encoded(allocated, facts)
