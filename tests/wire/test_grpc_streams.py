"""One side of a stream: what each side may send, and when the other side is given up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import grpc
import pytest

from fedsplit.wire import grpc_streams
from fedsplit.wire.chunks import LARGEST_CHUNK, Assembler, Chunk, Refused, blob_reading
from fedsplit.wire.frames import Reading
from fedsplit.wire.grpc_streams import ChunkStream
from fedsplit.wire.windows import SMALLEST_WINDOW, ReceiveWindow


class Pipe:
    """Two sides of a stream in one process."""

    def __init__(self, window: int = SMALLEST_WINDOW, pause: float = 30.0, held: Callable[[], int] = lambda: 0) -> None:
        self.messages: tuple[asyncio.Queue[Any], asyncio.Queue[Any]] = (asyncio.Queue(), asyncio.Queue())
        self.sides = [self._side(number, window, pause, held) for number in range(2)]

    def _side(self, number: int, window: int, pause: float, held: Callable[[], int]) -> ChunkStream[bytes]:
        assembler = Assembler(blob_reading, 2**30)
        incoming = ReceiveWindow(window)
        read, write = self.messages[number].get, self.messages[1 - number].put
        return ChunkStream(read, write, assembler, incoming, pause, held)

    async def greet(self) -> None:
        for side in self.sides:
            await side.greet()
        for side in self.sides:
            await side.welcome()


def play(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


@pytest.mark.parametrize("size", [1, LARGEST_CHUNK, 9 * LARGEST_CHUNK + 1])
def test_frames_larger_than_the_window_cross_in_both_directions(size: int) -> None:
    async def scenario() -> None:
        pipe = Pipe()
        await pipe.greet()
        frames = [bytes([number]) * size for number in range(2)]
        sending = [side.send([memoryview(frame)]) for side, frame in zip(pipe.sides, frames, strict=True)]
        receiving = [side.receive() for side in pipe.sides]
        *_, first, second = await asyncio.gather(*sending, *receiving)
        assert [second, first] == frames

    play(scenario())


def test_a_sender_waits_while_the_reader_has_enough() -> None:
    async def scenario() -> None:
        held = [2**30]
        pipe = Pipe(held=lambda: held[0] if pipe_is_open else 0)
        pipe_is_open = False
        await pipe.greet()
        pipe_is_open = True
        sender, reader = pipe.sides
        sending = asyncio.ensure_future(sender.send([memoryview(bytes(4 * LARGEST_CHUNK))]))
        receiving = asyncio.ensure_future(reader.receive())
        taken = pipe.messages[1]
        while reader._incoming.outstanding or not taken.empty():
            await asyncio.sleep(0.001)
        assert not sending.done() and not receiving.done()
        held[0] = 0
        answering = asyncio.ensure_future(sender.receive())  # takes the credit
        await reader.give_credit()
        await sending
        assert len(await receiving or b"") == 4 * LARGEST_CHUNK
        answering.cancel()

    play(scenario())


def test_little_is_copied_on_the_event_loop_and_much_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[bool] = []
    to_bytes = Chunk.to_bytes

    def noting(chunk: Chunk) -> bytes:
        try:
            asyncio.get_running_loop()
            copied.append(True)
        except RuntimeError:
            copied.append(False)
        return to_bytes(chunk)

    async def scenario() -> None:
        pipe = Pipe()
        await pipe.greet()
        monkeypatch.setattr(grpc_streams.Chunk, "to_bytes", noting)
        await pipe.sides[0].send([memoryview(b"x" * 1000)])
        await pipe.sides[0].send([memoryview(b"x" * LARGEST_CHUNK)])

    play(scenario())
    assert copied == [True, False]


def test_a_large_frame_is_joined_beside_the_event_loop_though_its_last_chunk_is_small() -> None:
    joined: list[str] = []

    def reading(total: int) -> Reading[bytes]:
        frame = yield from blob_reading(total)
        joined.append(threading.current_thread().name)
        return frame

    async def scenario() -> None:
        pipe = Pipe()
        await pipe.greet()
        reader = pipe.sides[1]
        reader._assembler = Assembler(reading, 2**30)
        for size in (10, LARGEST_CHUNK + 10):
            await pipe.sides[0].send([memoryview(bytes(size))])
            assert await reader.receive() == bytes(size)

    play(scenario())
    assert joined[0] == "MainThread" and joined[1].startswith("grpc-chunks")


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (grpc.aio.EOF, "the first message of a stream must give credit"),
        (Chunk(0, 5, data=b"frame").to_bytes(), "the first message of a stream must give credit"),
        (Chunk(0, 5, credit=1, data=b"frame").to_bytes(), "the first message of a stream must give credit"),
        (b"\xff", "the message is no chunk"),
    ],
    ids=["end", "no credit", "data", "no chunk"],
)
def test_a_stream_begins_with_credit_alone(message: Any, words: str) -> None:
    async def scenario() -> None:
        pipe = Pipe()
        await pipe.messages[0].put(message)
        with pytest.raises(Refused, match=words):
            await pipe.sides[0].welcome()

    play(scenario())


def test_a_stream_may_end_between_frames_only() -> None:
    async def scenario() -> None:
        pipe = Pipe()
        await pipe.greet()
        reader = pipe.sides[0]
        await pipe.messages[0].put(Chunk(0, 5, data=b"frame").to_bytes())
        assert await reader.receive() == b"frame"
        await pipe.messages[0].put(Chunk(1, 2**20, data=bytes(2**19)).to_bytes())
        await pipe.messages[0].put(grpc.aio.EOF)
        with pytest.raises(Refused, match="the stream ended in the middle of a frame"):
            await reader.receive()

    play(scenario())


async def watched(stream: ChunkStream[Any], seconds: float = 0.5) -> str:
    """Returns why a stream is given up; empty if the stream is not given up in some time."""
    try:
        await asyncio.wait_for(stream.watch(), seconds)
    except TimeoutError:
        return ""
    except Refused as refused:
        assert refused.status == "DEADLINE_EXCEEDED"
        return str(refused)
    raise AssertionError("the watch has ended")


def test_silence_counts_in_the_middle_of_a_frame_only() -> None:
    async def scenario() -> None:
        pipe = Pipe(pause=0.1)
        await pipe.greet()
        reader = pipe.sides[0]
        assert await watched(reader) == ""
        await pipe.messages[0].put(Chunk(0, 2**20, data=bytes(2**19)).to_bytes())
        receiving = asyncio.ensure_future(reader.receive())
        assert await watched(reader, 30) == "no byte came in 0.1 s in the middle of a frame"
        receiving.cancel()

    play(scenario())


def test_a_peer_without_credit_need_not_go_on() -> None:
    async def scenario() -> None:
        pipe = Pipe(pause=0.1, held=lambda: 2**30 if is_full else 0)
        is_full = False
        await pipe.greet()
        is_full = True
        reader = pipe.sides[0]
        for number in range(2):
            chunk = Chunk(number, 0 if number else 2**23, data=bytes(LARGEST_CHUNK))
            await pipe.messages[0].put(chunk.to_bytes())
        receiving = asyncio.ensure_future(reader.receive())
        while reader._incoming.outstanding:
            await asyncio.sleep(0.001)
        assert await watched(reader) == ""
        is_full = False
        await reader.give_credit()
        assert await watched(reader, 30) == "no byte came in 0.1 s in the middle of a frame"
        receiving.cancel()

    play(scenario())


def test_a_peer_that_takes_no_bytes_is_given_up() -> None:
    async def scenario() -> None:
        pipe = Pipe(pause=0.1)
        await pipe.greet()
        sending = asyncio.ensure_future(pipe.sides[0].send([memoryview(bytes(4 * LARGEST_CHUNK))]))
        assert await watched(pipe.sides[0], 30) == "no byte was taken in 0.1 s"
        sending.cancel()

    play(scenario())
