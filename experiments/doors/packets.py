"""Milliseconds that a packet and its answer take through each door to a trunk, on one machine.

    python -m experiments.doors.packets                     # writes packets.json beside this file, and the table

The server sends each packet back. A round sends one packet of each size through each door, in an order that
changes, so that a busy moment of the machine meets all doors. The table has medians, and the ratio to the local socket.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.doors.certificates import make_folders
from experiments.doors.servers import RayServer, Server
from experiments.speed.run import machine
from fedsplit.environment import prepare
from fedsplit.wire.casting import array_as
from fedsplit.wire.packets import Packet, StepKey

HERE = Path(__file__).parent
SIZES = (4 * 128 * 128 * 4, 400_000, 3_000_000, 17_000_000)
"""Bytes of a packet. The first is one of the bundled model: 4 sequences of 128 tokens, 128 float32 numbers each."""

KINDS = ("socket", "TCP", "gRPC", "gRPC, TLS")


def packet_of(size: int, step: int = 0, client: int = 0) -> Packet:
    """Returns a packet of some bytes."""
    values = np.random.default_rng(0).random(size // 4, np.float32)
    return Packet(StepKey(1, client, step), {"hidden": array_as(values, "float32")})


def seconds_of(client: Any, packet: Packet) -> float:
    """Returns the time of a packet and its answer."""
    began = time.perf_counter()
    client.send(packet)()
    return time.perf_counter() - began


def measure(rounds: int, with_ray: bool) -> list[dict[str, Any]]:
    """Returns the seconds of each door and size."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ending:
        root = Path(folder)
        make_folders(root, ["client"])
        clients: dict[str, Any] = {}
        servers = {kind: Server(kind, root) for kind in KINDS}
        for kind, server in servers.items():
            ending.callback(server.close)
            clients[kind] = server.client()
        if with_ray:
            ray_server = RayServer()
            ending.callback(ray_server.close)
            clients["Ray"] = ray_server.client()
        packets = {size: packet_of(size) for size in SIZES}
        taken: dict[tuple[str, int], list[float]] = {}
        for number in range(rounds + 2):
            # Each door is the first one now and then: caches are cold after the largest packets.
            turn = number % len(clients)
            doors = [*clients, *clients][turn : turn + len(clients)]
            for size, packet in packets.items():
                for door in doors:
                    seconds = seconds_of(clients[door], packet)
                    if number >= 2:  # the first rounds are warm-up
                        taken.setdefault((door, size), []).append(seconds)
    order = list(clients)
    return [
        {"door": door, "bytes": size, "seconds": times}
        for (door, size), times in sorted(taken.items(), key=lambda item: order.index(item[0][0]))
    ]


def table(records: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the rows of the table."""
    medians = {(record["door"], record["bytes"]): statistics.median(record["seconds"]) for record in records}
    doors = list(dict.fromkeys(door for door, _ in medians))
    sizes = list(dict.fromkeys(size for _, size in medians))
    lines = ["| bytes of a packet | " + " | ".join(f"{door}, ms" for door in doors) + " |"]
    lines.append("|---:|" + "---:|" * len(doors))
    for size in sizes:
        base = medians["socket", size]
        cells = [f"{medians[door, size] * 1e3:.2f} ({medians[door, size] / base:.1f})" for door in doors]
        lines.append(f"| {size:,} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "packets.json")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--no-ray", action="store_true")
    args = parser.parse_args()
    prepare()
    records = measure(args.rounds, not args.no_ray)
    args.out.write_text(json.dumps({"machine": machine(), "records": records}) + "\n")
    print("\n".join(table(records)))


if __name__ == "__main__":
    main()
