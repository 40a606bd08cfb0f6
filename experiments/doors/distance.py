"""A trunk at a distance: packets over gRPC through a proxy with latency and bandwidth, and micro-batches in flight.

    python -m experiments.doors.distance                    # writes distance.json beside this file, and the table

The proxy is a program of this machine that holds bytes back, for kernels without netem. A step is divided into
micro-batches. A client sends the next one without waiting for the answer, up to the number in flight. Between two
packets the client computes: the experiment waits for that time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.doors.certificates import make_folders
from experiments.doors.packets import packet_of
from experiments.doors.servers import Server
from experiments.speed.run import machine

HERE = Path(__file__).parent
STEP_BYTES = 4 * 128 * 768 * 4
"""Bytes of a step's hidden states: 4 sequences of 128 tokens, 768 float32 numbers each, as of GPT-2 small."""

MICROS = 8
"""Micro-batches of a step."""

IN_FLIGHT = (1, 2, 4, 8)
LINKS = tuple((latency, rate) for latency in (1, 10, 50) for rate in (10, 100, 1000))
"""Milliseconds in each direction, and Mbit/s."""

COMPUTE_SECONDS = 0.010
"""Time of a client's computation for one micro-batch."""

_PIECE = 2**14


class Proxy:
    """A port that passes bytes on, with a latency and a bandwidth in each direction."""

    def __init__(self, target: int, latency: float, rate: float) -> None:
        """Starts to listen.

        Args:
            target: Port of the server.
            latency: Seconds in each direction.
            rate: Bytes a second in each direction.
        """
        self._target = target
        self._latency = latency
        self._rate = rate
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.port: int = self._call(self._listen())

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _listen(self) -> int:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=_PIECE)
        return int(self._server.sockets[0].getsockname()[1])

    async def _accept(self, near_in: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        far_in, far_out = await asyncio.open_connection("127.0.0.1", self._target, limit=_PIECE)
        with contextlib.suppress(OSError):
            await asyncio.gather(self._pass_on(near_in, far_out), self._pass_on(far_in, near_out))

    async def _pass_on(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        """Reads at the link's rate, and writes each piece after the link's latency."""
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        writing = asyncio.ensure_future(self._write(waiting, sink))
        free = 0.0
        try:
            while piece := await source.read(_PIECE):
                now = self._loop.time()
                free = max(free, now) + len(piece) / self._rate
                waiting.put_nowait((free + self._latency, piece))
                # A few milliseconds of bytes may be ahead: the timer of an event loop is not finer.
                if free - now > 0.005:
                    await asyncio.sleep(free - now - 0.004)
            waiting.put_nowait((free + self._latency, b""))
            await writing
        finally:
            writing.cancel()

    async def _write(self, waiting: asyncio.Queue[tuple[float, bytes]], sink: asyncio.StreamWriter) -> None:
        while True:
            due, piece = await waiting.get()
            if (left := due - self._loop.time()) > 0:
                await asyncio.sleep(left)
            if not piece:
                sink.close()
                return
            sink.write(piece)
            await sink.drain()

    def close(self) -> None:
        """Takes no more connections."""
        self._loop.call_soon_threadsafe(self._server.close)


def play(client: Any, in_flight: int, steps: int, wait: Callable[[float], None] = time.sleep) -> float:
    """Returns the median seconds of a step.

    Args:
        client: Transport to the server.
        in_flight: Most micro-batches without an answer.
        steps: Number of steps.
        wait: Waits for the time of a computation.
    """
    packet = packet_of(STEP_BYTES // MICROS)
    taken = []
    for _ in range(steps):
        began = time.perf_counter()
        answers: deque[Any] = deque()
        for _ in range(MICROS):
            if len(answers) == in_flight:
                answers.popleft()()
            wait(COMPUTE_SECONDS)
            answers.append(client.send(packet))
        while answers:
            answers.popleft()()
        taken.append(time.perf_counter() - began)
    return sorted(taken)[len(taken) // 2]


def bound(latency: float, rate: float, in_flight: int) -> float:
    """Returns the seconds of a step if nothing but link and computation took time.

    Example:
        >>> round(bound(0.0, float("inf"), 1), 3) == round(MICROS * COMPUTE_SECONDS, 3)
        True
    """
    crossing = STEP_BYTES / MICROS / rate
    computed = up = down = 0.0  # when the client and each direction of the link are free
    answered: list[float] = []
    for micro in range(MICROS):
        begins = max(computed, answered[micro - in_flight] if micro >= in_flight else 0.0)
        computed = begins + COMPUTE_SECONDS
        up = max(computed, up) + crossing
        down = max(up + latency, down) + crossing
        answered.append(down + latency)
    return answered[-1]


def measure(steps: int) -> list[dict[str, Any]]:
    """Returns the seconds of a step by link and micro-batches in flight."""
    records = []
    with tempfile.TemporaryDirectory() as folder:
        make_folders(Path(folder), ["client"])
        server = Server("gRPC, TLS", Path(folder))
        for latency, rate in LINKS:
            proxy = Proxy(server.address, latency / 1e3, rate * 1e6 / 8)
            client = server.client(proxy.port)
            client.send(packet_of(STEP_BYTES))()  # opens the stream
            seconds = {count: play(client, count, steps) for count in IN_FLIGHT}
            bounds = {count: bound(latency / 1e3, rate * 1e6 / 8, count) for count in IN_FLIGHT}
            records.append({"latency": latency, "rate": rate, "seconds": seconds, "bounds": bounds})
            print(row(records[-1]), flush=True)
            client.close()
            proxy.close()
        server.close()
    return records


def row(record: dict[str, Any]) -> str:
    """Returns a row of the table."""
    cells = [f"{seconds * 1e3:.0f}" for seconds in record["seconds"].values()]
    least = min(record["bounds"].values())
    return f"| {record['latency']} | {record['rate']:,} | {' | '.join(cells)} | {least * 1e3:.0f} |"


def table(records: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the lines of the table."""
    heads = " | ".join(f"{count} in flight, ms" for count in IN_FLIGHT)
    lines = [f"| latency, ms | Mbit/s | {heads} | least possible, ms |", "|---:|---:|" + "---:|" * (len(IN_FLIGHT) + 1)]
    return lines + [row(record) for record in records]


def main() -> None:
    """Measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "distance.json")
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    records = measure(args.steps)
    args.out.write_text(json.dumps({"machine": machine(), "records": records}, indent=1) + "\n")
    print("\n".join(table(records)))


if __name__ == "__main__":
    main()
