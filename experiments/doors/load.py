"""Load on a gRPC server: many clients at once on loopback, each with mutual TLS and a stream of its own.

    python -m experiments.doors.load                        # 20 s
    python -m experiments.doors.load --seconds 300          # writes load.json beside this file

Each client sends a forward and a gradient of a step, one after the other, as fast as answers come. The server counts
every step; the clients compare every answer with what they sent.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from experiments.doors.certificates import make_folders
from experiments.doors.packets import packet_of
from experiments.speed.run import machine
from fedsplit.wire.casting import array_as
from fedsplit.wire.grpc_address import GrpcAddress
from fedsplit.wire.grpc_client import GrpcClient
from fedsplit.wire.grpc_server import GrpcServer
from fedsplit.wire.identities import read_identities
from fedsplit.wire.packets import Packet, StepKey

HERE = Path(__file__).parent
TOKEN = b"a token of the experiments"
_spawning = multiprocessing.get_context("spawn")


def _serve(root: Path, pipe: Connection) -> None:
    """Serves until the pipe has a message, and sends the number of packets by client."""
    counts: Counter[int] = Counter()
    doubled: list[str] = []
    newest: dict[int, tuple[int, int]] = {}

    def serve(packet: Packet, done: Callable[[Packet | Exception], None]) -> None:
        key = packet.key
        place = key.step, key.micro
        if place <= newest.get(key.client, (-1, -1)):
            doubled.append(str(key))
        newest[key.client] = place
        counts[key.client] += 1
        done(packet)

    server = GrpcServer(serve, token=TOKEN, identities=read_identities(root / "server"))
    pipe.send(server.port)
    pipe.recv()
    pipe.send((dict(counts), len(doubled)))


def _play(root: Path, port: int, numbers: range, seconds: float, size: int, pipe: Connection) -> None:
    """Plays clients, one thread each, and sends the packets by client, the wrong answers and the times."""
    counts: dict[int, int] = {}
    wrong: list[str] = []
    taken: list[float] = []

    def play(number: int) -> None:
        client = GrpcClient(GrpcAddress("127.0.0.1", port, str(root / f"client-{number}"), TOKEN), number)
        values = packet_of(size).tensors["hidden"].array("values").copy()
        count = 0
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for micro, name in enumerate(("hidden", "gradient")):
                values[0] = count
                key = StepKey(1, number, count // 2, micro=micro)
                began = time.perf_counter()
                answer = client.send(Packet(key, {name: array_as(values, "float32")}))()
                taken.append(time.perf_counter() - began)
                if answer.key != key or not np.array_equal(answer.tensors[name].array("values"), values):
                    wrong.append(str(key))
                count += 1
        counts[number] = count
        client.close()

    threads = [threading.Thread(target=play, args=(number,)) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pipe.send((counts, len(wrong), taken))


def measure(clients: int, seconds: float, size: int, processes: int) -> dict[str, Any]:
    """Returns what the load was, and what became of it."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_folders(root, [f"client-{number}" for number in range(clients)])
        near, far = _spawning.Pipe()
        serving = _spawning.Process(target=_serve, args=(root, far), daemon=True)
        serving.start()
        port = near.recv()
        players = []
        for process in range(processes):
            pipe, other = _spawning.Pipe()
            numbers = range(process, clients, processes)
            playing = _spawning.Process(target=_play, args=(root, port, numbers, seconds, size, other), daemon=True)
            playing.start()
            players.append(pipe)
        memory = _memory_during(serving.pid or 0, seconds)
        sent: dict[int, int] = {}
        taken: list[float] = []
        wrong = 0
        for pipe in players:
            counts, faults, times = pipe.recv()
            sent |= counts
            wrong += faults
            taken += times
        near.send(None)
        served, doubled = near.recv()
        serving.join(30)
    return {
        "clients": clients,
        "seconds": seconds,
        "bytes": size,
        "packets": sum(sent.values()),
        "lost": sum(max(0, count - served.get(client, 0)) for client, count in sent.items()),
        "doubled": doubled + sum(max(0, served[client] - count) for client, count in sent.items()),
        "wrong": wrong,
        "percentiles": dict(zip(("50", "95", "99"), np.percentile(taken, [50, 95, 99]).tolist(), strict=True)),
        "slowest": max(taken),
        "fewest": min(sent.values()),
        "most": max(sent.values()),
        "memory": memory,
    }


def _memory_during(process: int, seconds: float) -> list[int]:
    """Returns the resident bytes of a process, ten times in some seconds."""
    watched = psutil.Process(process)
    memory = []
    for _ in range(10):
        time.sleep(seconds / 10)
        memory.append(watched.memory_info().rss)
    return memory


def table(record: dict[str, Any]) -> list[str]:
    """Returns the lines of the result."""
    size = record["bytes"]
    rate = record["packets"] / record["seconds"]
    times = ", ".join(f"p{name} {seconds * 1e3:.0f}" for name, seconds in record["percentiles"].items())
    memory = [nbytes / 1e6 for nbytes in record["memory"]]
    return [
        f"{record['clients']} clients for {record['seconds']:g} s, packets of {size:,} bytes",
        f"packets and answers: {record['packets']:,}, {rate:,.0f} a second, {2 * rate * size / 1e6:,.0f} MB/s",
        f"milliseconds: {times}, slowest {record['slowest'] * 1e3:.0f}",
        f"packets of a client: {record['fewest']:,} to {record['most']:,}",
        f"lost {record['lost']}, doubled {record['doubled']}, wrong answers {record['wrong']}",
        "memory of the server, MB: "
        f"{memory[1]:.0f} after a fifth, {memory[-1]:.0f} at the end, {max(memory):.0f} at most",
    ]


def main() -> None:
    """Measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "load.json")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--bytes", type=int, default=4 * 128 * 128 * 4)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    record = measure(args.clients, args.seconds, args.bytes, args.processes)
    args.out.write_text(json.dumps({"machine": machine(), **record}, indent=1) + "\n")
    print("\n".join(table(record)))


if __name__ == "__main__":
    main()
