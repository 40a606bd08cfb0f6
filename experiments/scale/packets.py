"""Time of a packet and its answer over TCP, with and without TLS: on this machine, from a process to another.

    python -m experiments.scale.packets                       # writes packets.json beside this file, and the table

The server sends each packet back. A straight line through the times by bytes tells what a message costs, and a byte.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from experiments.speed.run import machine
from fedsplit.wire.casting import array_as
from fedsplit.wire.packets import Packet, StepKey
from fedsplit.wire.socket_server import PacketServer
from fedsplit.wire.sockets import PacketClient

HERE = Path(__file__).parent
SIZES = (2**13, 2**17, 2**19, 2**21, 2**23)
"""Bytes of a packet."""


def make_certificates(folder: Path) -> None:
    """Makes an authority and a certificate, by the commands of docs/cluster.md."""
    commands = """
    req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -subj /CN=a -keyout ca.key -out ca.pem
    req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=n -keyout key.pem -out node.csr
    x509 -req -in node.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 1 -out cert.pem
    """
    for command in commands.strip().splitlines():
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)


def _serve(tls: str, pipe: Connection) -> None:
    server = PacketServer(lambda packet, done: done(packet), "127.0.0.1", tls)
    pipe.send(replace(server.address, name="elsewhere"))
    pipe.recv()


def measure(tls: str, sizes: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Returns the median seconds of a packet and its answer, by bytes."""
    near, far = multiprocessing.get_context("spawn").Pipe()
    serving = multiprocessing.get_context("spawn").Process(target=_serve, args=(tls, far))
    serving.start()
    client = PacketClient(near.recv())
    records = []
    for size in sizes:
        packet = Packet(StepKey(1, 0, 0), {"hidden": array_as(np.zeros(size // 4, np.float32), "float32")})
        taken = []
        for _ in range(repeats):
            began = time.perf_counter()
            client.send(packet)()
            taken.append(time.perf_counter() - began)
        records.append({"tls": bool(tls), "bytes": packet.nbytes, "seconds": statistics.median(taken)})
    near.send(None)
    serving.join()
    return records


def costs(records: Sequence[dict[str, Any]], tls: bool) -> tuple[float, float]:
    """Returns the seconds of a message and its answer without bytes, and of a byte that goes both ways."""
    own = [record for record in records if record["tls"] is tls]
    least, most = own[0], own[-1]
    a_byte = (most["seconds"] - least["seconds"]) / (most["bytes"] - least["bytes"])
    return least["seconds"] - a_byte * least["bytes"], a_byte


def table(records: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the rows of a table."""
    lines = ["| bytes of a packet | TCP, ms | with TLS, ms |", "|---:|---:|---:|"]
    found = {(record["bytes"], record["tls"]): record["seconds"] * 1e3 for record in records}
    sizes = sorted({size for size, _ in found})
    return lines + [f"| {size:,} | {found[size, False]:.2f} | {found[size, True]:.2f} |" for size in sizes]


def main() -> None:
    """Measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "packets.json")
    parser.add_argument("--repeats", type=int, default=200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_certificates(Path(folder))
        records = [record for tls in ("", folder) for record in measure(tls, SIZES, args.repeats)]
    args.out.write_text(json.dumps({"machine": machine(), "records": records}, indent=1) + "\n")
    print("\n".join(table(records)))


if __name__ == "__main__":
    main()
