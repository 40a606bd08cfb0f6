"""Chunks: a frame comes out as it was, and a stream that is not in order comes to an end without taking memory."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.trunk.memory import resident_memory
from fedsplit.wire import chunks, frames
from fedsplit.wire.casting import array_as
from fedsplit.wire.chunks import LARGEST_CHUNK, Assembler, Chunk, Refused, blob_reading, cut, nbytes_of
from fedsplit.wire.grpc_schema import ChunkMessage
from fedsplit.wire.packets import Packet, StepKey


@pytest.fixture(autouse=True, scope="module")
def small_chunks() -> Iterator[None]:
    """Chunks of few bytes, so that small frames have many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "LARGEST_CHUNK", 16)
        patch.setattr(chunks, "SMALLEST_CHUNK", 4)
        yield


def chunks_of(frame: bytes, first: int = 0) -> list[Chunk]:
    """Cuts a frame into chunks."""
    cuts = [b"".join(data) for data in cut([memoryview(frame)])]
    return [Chunk(first + place, 0 if place else len(frame), data=data) for place, data in enumerate(cuts)]


def taken(sent: list[Chunk], largest: int = 2**20) -> list[bytes]:
    """Puts frames together."""
    assembler = Assembler(blob_reading, largest)
    return [frame for frame in map(assembler.take, sent) if frame is not None]


FRAMES = st.binary(min_size=1, max_size=200)


@given(st.lists(FRAMES, max_size=4))
def test_frames_come_out_as_they_were(sent: list[bytes]) -> None:
    stream: list[Chunk] = []
    for frame in sent:
        stream += chunks_of(frame, len(stream))
    assert taken(stream) == sent


@given(st.lists(st.binary(max_size=50), max_size=9))
def test_pieces_of_any_size_are_cut_without_a_change(pieces: list[bytes]) -> None:
    views = [memoryview(piece) for piece in pieces]
    cuts = list(cut(views))
    assert b"".join(b"".join(data) for data in cuts) == b"".join(pieces)
    sizes = [nbytes_of(data) for data in cuts]
    assert all(size == 16 for size in sizes[:-1]) and all(0 < size <= 16 for size in sizes[-1:])


@given(st.lists(FRAMES, min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_a_stream_out_of_order_ends_and_gives_no_wrong_frame(sent: list[bytes], chance: random.Random) -> None:
    """Chunks are doubled, left out, exchanged and shortened."""
    stream: list[Chunk] = []
    for frame in sent:
        stream += chunks_of(frame, len(stream))
    spoilt = list(stream)
    place = chance.randrange(len(spoilt))
    match chance.choice(["again", "missing", "exchanged", "shorter", "longer"]):
        case "again":
            spoilt.insert(place + 1, spoilt[place])
        case "missing":
            del spoilt[place]
        case "exchanged":
            other = chance.randrange(len(spoilt))
            spoilt[place], spoilt[other] = spoilt[other], spoilt[place]
        case "shorter":
            spoilt[place] = replace(spoilt[place], data=spoilt[place].data[:-1])
        case "longer":
            spoilt[place] = replace(spoilt[place], data=bytes(spoilt[place].data) + b"x")
    assembler = Assembler(blob_reading, 2**20)
    came = []
    try:
        came = [frame for frame in map(assembler.take, spoilt) if frame is not None]
    except Refused as refused:
        assert refused.status in ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED")
        return
    assert spoilt == stream or assembler.left or len(came) < len(sent)  # the end is missing
    assert came == sent[: len(came)]


@pytest.mark.parametrize(
    ("spoil", "status", "words"),
    [
        (lambda c: [c[0], c[0]], "INVALID_ARGUMENT", "chunk 0 came again"),
        (lambda c: [c[0], c[2]], "INVALID_ARGUMENT", "chunk 2 came before chunk 1"),
        (lambda c: [c[0], replace(c[1], total=40)], "INVALID_ARGUMENT", "a frame begins while 24 bytes"),
        (lambda c: [replace(c[0], total=0)], "INVALID_ARGUMENT", "does not say how long"),
        (lambda c: [replace(c[0], total=10)], "INVALID_ARGUMENT", "16 bytes came where 10 bytes"),
        (lambda c: [replace(c[0], data=b"x" * 17)], "RESOURCE_EXHAUSTED", "a chunk of 17 bytes is too large"),
        (lambda c: [c[0], replace(c[1], data=b"x")], "INVALID_ARGUMENT", "a chunk of 1 bytes is too small"),
        (lambda c: [replace(c[0], total=101)], "RESOURCE_EXHAUSTED", "a frame of 101 bytes is too large"),
        (lambda c: [replace(c[0], total=2**64 - 1)], "RESOURCE_EXHAUSTED", "is too large; at most 100"),
    ],
    ids=["again", "early", "another", "no total", "beyond", "large", "small", "too large", "largest"],
)
def test_each_fault_has_a_name(spoil, status: str, words: str) -> None:
    with pytest.raises(Refused, match=words) as refused:
        taken(spoil(chunks_of(b"x" * 40)), largest=100)
    assert refused.value.status == status


def test_chunks_of_no_bytes_come_to_an_end() -> None:
    first, *_ = chunks_of(b"x" * 40)
    with pytest.raises(Refused, match="a chunk of 0 bytes is too small"):
        taken([first, *(Chunk(number) for number in range(1, 1000))])


def packet(size: int = 9) -> Packet:
    return Packet(StepKey(1, 2, 3, run="run"), {"hidden": array_as(np.arange(size, dtype=np.float32), "float32")})


def frame_of(packet: Packet) -> bytes:
    return b"".join(frames.pieces_of(7, packet))


def packets_taken(sent: list[Chunk]) -> list[tuple[int, Packet | Exception]]:
    assembler = Assembler(lambda total: frames.reading(total), 2**30)
    return [frame for frame in map(assembler.take, sent) if frame is not None]


@pytest.mark.parametrize("size", [0, 1, 9, 1000])
def test_a_packet_crosses_in_chunks_to_the_bit(size: int) -> None:
    [(number, came)] = packets_taken(chunks_of(frame_of(packet(size))))
    assert number == 7 and isinstance(came, Packet)
    assert came.tensors["hidden"].array("values").tolist() == list(range(size))


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (frame_of(packet()) + b"more", "a frame is longer than its header says"),
        (frame_of(packet())[:-4], "a frame is shorter than its header says"),
        (frame_of(packet())[:30], "a frame is shorter than its header says"),
        (b"x" * 60, "a frame is no packet: a header is too long"),
        (frame_of(packet()).replace(b'"round"', b'"sound"'), "a frame is no packet: "),
    ],
    ids=["longer", "shorter", "cut in the header", "no header", "no key"],
)
def test_a_frame_that_is_no_packet_is_refused(frame: bytes, words: str) -> None:
    with pytest.raises(Refused, match=words) as refused:
        packets_taken(chunks_of(frame))
    assert refused.value.status == "INVALID_ARGUMENT"


def test_a_packet_may_not_claim_more_than_its_frame() -> None:
    frame = frame_of(packet()).replace(b"[9]", b"[9000000000]")
    length = len(frame) - 36 - 12
    frame = frame[:8] + length.to_bytes(4, "little") + frame[12:]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Refused, match="a packet is too large"):
        patch.setattr(np, "empty", lambda *args: pytest.fail("memory was taken"))
        packets_taken(chunks_of(frame))


def test_memory_is_taken_as_bytes_come_and_not_as_they_are_promised() -> None:
    before = resident_memory()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "LARGEST_CHUNK", LARGEST_CHUNK)
        assembler = Assembler(blob_reading, 2**32)
        assembler.take(Chunk(0, 2**31, data=bytes(2**15)))
        assert assembler.left == 2**31 - 2**15
        assert resident_memory() - before < 2**27


@given(st.binary(max_size=60))
def test_whatever_bytes_come_they_are_a_chunk_or_refused(message: bytes) -> None:
    try:
        chunk = Chunk.from_bytes(message)
    except Refused as refused:
        assert refused.status == "INVALID_ARGUMENT"
        return
    assert isinstance(chunk.data, bytes) and min(chunk.sequence, chunk.total, chunk.credit, chunk.most) >= 0


NUMBERS = st.integers(0, 2**64 - 1)


@given(st.builds(Chunk, NUMBERS, NUMBERS, NUMBERS, NUMBERS, st.binary(max_size=300)))
def test_a_chunk_is_a_message_of_the_service(chunk: Chunk) -> None:
    message = chunk.to_bytes()
    read = ChunkMessage.FromString(message)
    assert vars(chunk) == {name: getattr(read, name) for name in vars(chunk)}
    assert Chunk.from_bytes(read.SerializeToString()) == chunk
    half = len(chunk.data) // 2
    in_pieces = replace(chunk, data=[memoryview(chunk.data)[:half], memoryview(chunk.data)[half:]])
    assert in_pieces.to_bytes() == message
