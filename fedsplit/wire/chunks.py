"""Chunks: a frame in pieces of at most 1 MiB, numbered within a stream, and a frame that is put together again.

A stream has one sequence of chunks in each direction. A chunk that comes again, too early, too late, too large or too
small ends the stream. Memory is taken as bytes come, and never because a chunk promises them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.message import DecodeError

from fedsplit.errors import first_line
from fedsplit.wire.frames import Reading
from fedsplit.wire.grpc_schema import DATA_TAG, ChunkMessage

T = TypeVar("T")

LARGEST_CHUNK = 2**20
"""Most bytes of data in a chunk."""

SMALLEST_CHUNK = 2**14
"""Fewest bytes of data in a chunk that is not the last one of its frame. So a frame has a limited number of chunks."""

LARGEST_MESSAGE = LARGEST_CHUNK + 2**10
"""Most bytes of a chunk as a message, with its numbers."""

_NO_FRAME = (ValueError, TypeError, KeyError, AttributeError, RecursionError, MemoryError)
"""Errors of reading a frame from bytes that are no frame."""


class Refused(Exception):
    """A stream must end. The message is one line for the peer.

    Attributes:
        status: Name of a gRPC status, such as "INVALID_ARGUMENT".

    Example:
        >>> refused = Refused("RESOURCE_EXHAUSTED", "a frame is too large")
        >>> refused.status, str(refused)
        ('RESOURCE_EXHAUSTED', 'a frame is too large')
    """

    def __init__(self, status: str, words: str) -> None:
        """Takes the name of a status, and a line for the peer."""
        super().__init__(words)
        self.status = status


@dataclass(frozen=True)
class Chunk:
    """A message of a stream: a piece of a frame, or permission for the peer to send more bytes, or both.

    Attributes:
        sequence: Number of the piece among all pieces of its stream and direction, from 0.
        total: Bytes of the frame, in the first piece of a frame; otherwise 0.
        credit: Bytes of data that the peer may send beyond all earlier credit.
        most: Most packets without an answer, in the first message of a server; otherwise 0.
        data: The piece; empty in a message that only gives credit.

    Example:
        >>> chunk = Chunk(sequence=3, total=5, data=b"frame")
        >>> Chunk.from_bytes(chunk.to_bytes()) == chunk
        True
    """

    sequence: int = 0
    total: int = 0
    credit: int = 0
    most: int = 0
    data: bytes | Sequence[memoryview] = b""

    def to_bytes(self) -> bytes:
        """Returns the chunk as a protobuf message. The pieces of memory in `data` are copied once."""
        numbers: bytes = ChunkMessage(
            sequence=self.sequence, total=self.total, credit=self.credit, most=self.most
        ).SerializeToString()
        pieces = [self.data] if isinstance(self.data, bytes) else self.data
        length = sum(map(len, pieces))
        if not length:
            return numbers
        # `data` has the last number of all fields, so it may stand behind the others. Protobuf would copy it twice.
        return b"".join([numbers, DATA_TAG, _varint(length), *pieces])

    @classmethod
    def from_bytes(cls, message: bytes) -> Chunk:
        """Reads a chunk.

        Raises:
            Refused: The bytes are no chunk.
        """
        try:
            read = ChunkMessage.FromString(message)
        except DecodeError as error:
            raise Refused("INVALID_ARGUMENT", "the message is no chunk") from error
        return cls(read.sequence, read.total, read.credit, read.most, read.data)


def _varint(number: int) -> bytes:
    r"""Returns a number as protobuf writes it: seven bits a byte, the lowest first.

    Example:
        >>> _varint(300)
        b'\xac\x02'
    """
    groups = bytearray()
    while number > 127:
        groups.append(number & 127 | 128)
        number >>= 7
    groups.append(number)
    return bytes(groups)


def nbytes_of(pieces: Sequence[memoryview]) -> int:
    """Returns the number of bytes of a frame."""
    return sum(map(len, pieces))


def cut(pieces: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    """Cuts a frame into pieces of `LARGEST_CHUNK` bytes, and one of the rest. No memory is copied.

    Args:
        pieces: The frame as pieces of memory of any size.

    Yields:
        The memory of one chunk.

    Example:
        >>> frame = [memoryview(b"header"), memoryview(bytes(LARGEST_CHUNK))]
        >>> [[len(piece) for piece in chunk] for chunk in cut(frame)]
        [[6, 1048570], [6]]
    """
    chunk: list[memoryview] = []
    room = LARGEST_CHUNK
    for piece in pieces:
        left = piece
        while left:
            chunk.append(left[:room])
            left = left[room:]
            room -= len(chunk[-1])
            if not room:
                yield chunk
                chunk = []
                room = LARGEST_CHUNK
    if chunk:
        yield chunk


class Assembler(Generic[T]):
    """Puts frames together from the chunks of one direction of a stream.

    Example:
        >>> assembler = Assembler(blob_reading, largest=100)
        >>> frame = b"x" * 90
        >>> assembler.take(Chunk(sequence=0, total=90, data=frame)) == frame
        True
        >>> assembler.take(Chunk(sequence=0, total=90, data=frame))
        Traceback (most recent call last):
        fedsplit.wire.chunks.Refused: chunk 0 came again
    """

    def __init__(self, begin: Callable[[int], Reading[T]], largest: int) -> None:
        """Waits for the first chunk.

        Args:
            begin: Begins to read a frame with a number of bytes, such as `blob_reading`.
            largest: Most bytes of a frame.
        """
        self._begin = begin
        self._largest = largest
        self._next = 0
        self._total = 0
        self._left = 0
        self._reading: Reading[T] | None = None
        self._memory = memoryview(b"")

    @property
    def left(self) -> int:
        """Bytes that the begun frame still lacks; 0 between frames."""
        return self._left

    @property
    def total(self) -> int:
        """Bytes of the begun frame; 0 between frames."""
        return self._total if self._left else 0

    def take(self, chunk: Chunk) -> T | None:
        """Takes the next chunk with data.

        Returns:
            The frame that the chunk completes; None if more chunks must come.

        Raises:
            Refused: The chunk is not the one that must come next. No further chunk may be taken.
        """
        assert isinstance(chunk.data, bytes)
        self._check_order(chunk.sequence)
        if self._reading is None:
            self._begin_frame(chunk.total)
        elif chunk.total:
            raise Refused("INVALID_ARGUMENT", f"a frame begins while {self._left} bytes of another one are missing")
        self._check_size(len(chunk.data))
        self._left -= len(chunk.data)
        return self._fill(memoryview(chunk.data))

    def _check_order(self, sequence: int) -> None:
        if sequence < self._next:
            raise Refused("INVALID_ARGUMENT", f"chunk {sequence} came again")
        if sequence > self._next:
            raise Refused("INVALID_ARGUMENT", f"chunk {sequence} came before chunk {self._next}")
        self._next += 1

    def _begin_frame(self, total: int) -> None:
        if not total:
            raise Refused("INVALID_ARGUMENT", "the first chunk of a frame does not say how long the frame is")
        if total > self._largest:
            words = f"a frame of {total} bytes is too large; at most {self._largest} are allowed"
            raise Refused("RESOURCE_EXHAUSTED", words)
        self._total = total
        self._left = total
        self._reading = self._begin(total)
        self._memory = next(self._reading)

    def _check_size(self, size: int) -> None:
        if size > LARGEST_CHUNK:
            raise Refused("RESOURCE_EXHAUSTED", f"a chunk of {size} bytes is too large")
        if size > self._left:
            raise Refused("INVALID_ARGUMENT", f"{size} bytes came where {self._left} bytes of the frame were missing")
        # Chunks of few bytes would cost time without an end.
        if size < min(SMALLEST_CHUNK, self._left):
            raise Refused("INVALID_ARGUMENT", f"a chunk of {size} bytes is too small")

    def _fill(self, data: memoryview) -> T | None:
        """Writes bytes into the memory of the frame. Returns the frame if it is complete."""
        while True:
            count = min(len(data), len(self._memory))
            self._memory[:count] = data[:count]
            self._memory = self._memory[count:]
            data = data[count:]
            if self._memory:
                if not self._left:
                    raise Refused("INVALID_ARGUMENT", "a frame is shorter than its header says")
                return None
            frame = self._go_on()
            if frame is not None:
                if data or self._left:
                    raise Refused("INVALID_ARGUMENT", "a frame is longer than its header says")
                return frame

    def _go_on(self) -> T | None:
        """Gets the next memory to fill. Returns the frame if no memory is left to fill."""
        assert self._reading is not None
        try:
            self._memory = next(self._reading)
        except StopIteration as end:
            self._reading = None
            self._memory = memoryview(b"")  # a view of the last array would keep the array
            frame: T = end.value
            return frame
        except _NO_FRAME as error:
            raise Refused("INVALID_ARGUMENT", f"a frame is no packet: {first_line(error)}") from error
        return None


def blob_reading(total: int) -> Reading[bytes]:
    """Reads a frame that is bytes without a form.

    Args:
        total: Bytes of the frame.

    Yields:
        Memory for at most `LARGEST_CHUNK` bytes. So memory is taken as bytes come.

    Returns:
        The bytes.
    """
    pieces: list[bytearray] = []
    while total:
        pieces.append(bytearray(min(total, LARGEST_CHUNK)))
        total -= len(pieces[-1])
        yield memoryview(pieces[-1])
    return b"".join(pieces)
