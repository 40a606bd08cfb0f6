"""A trunk at a distance, between network namespaces: each side has a TCP of its own kernel's, and packets take time.

    sudo python -m experiments.doors.namespaces             # writes namespaces.json beside this file, and the table

The step is that of `distance.py`, over gRPC with TLS. `experiments.scale.links` carries the packets of the two hosts in
user space, with latency and bandwidth.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments.doors.certificates import make_folders
from experiments.doors.distance import IN_FLIGHT, LINKS, STEP_BYTES, bound, play, row, table
from experiments.doors.packets import packet_of
from experiments.doors.servers import TOKEN, echo
from experiments.scale.hosts import Hosts
from experiments.speed.run import machine
from fedsplit.wire.grpc_address import GrpcAddress
from fedsplit.wire.grpc_client import GrpcClient
from fedsplit.wire.grpc_server import GrpcServer
from fedsplit.wire.identities import read_identities

HERE = Path(__file__).parent
PORT = 50052


def serve(folder: Path, host: str) -> None:
    """Sends packets back until the process is ended."""
    GrpcServer(echo, host=host, port=PORT, token=TOKEN, identities=read_identities(folder / "server"))
    print("ready", flush=True)
    sys.stdin.read()


def ask(folder: Path, host: str, steps: int) -> dict[int, float]:
    """Returns the seconds of a step by the number of micro-batches in flight."""
    client = GrpcClient(GrpcAddress(host, PORT, str(folder / "client"), TOKEN), 0)
    client.send(packet_of(STEP_BYTES))()  # opens the stream, and lets TCP find the bandwidth
    seconds = {count: play(client, count, steps) for count in IN_FLIGHT}
    client.close()
    return seconds


def measure(steps: int) -> list[dict[str, Any]]:
    """Returns the seconds of a step by link and micro-batches in flight."""
    records = []
    module = [sys.executable, "-m", "experiments.doors.namespaces"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "certificates"
        for latency, rate in LINKS:
            hosts = Hosts(2, Path(scratch), rate)
            server_at = hosts.address(0)
            make_folders(folder, ["client"], server_at)
            with hosts.up(latency, with_ray=False):
                call = ["ip", "netns", "exec", hosts.names[0], *module, "--serve", str(folder)]
                with subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
                    assert server.stdout is not None
                    server.stdout.readline()
                    call = ["ip", "netns", "exec", hosts.names[1], *module, "--ask", str(folder), "--steps", str(steps)]
                    asked = subprocess.run(call, check=True, capture_output=True, text=True)
                    server.kill()
            seconds = {int(count): value for count, value in json.loads(asked.stdout).items()}
            bounds = {count: bound(latency / 1e3, rate * 1e6 / 8, count) for count in IN_FLIGHT}
            records.append({"latency": latency, "rate": rate, "seconds": seconds, "bounds": bounds})
            print(row(records[-1]), flush=True)
    return records


def main() -> None:
    """Measures, or plays one side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "namespaces.json")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--serve", type=Path, metavar="FOLDER", help="be the server, with these certificates")
    parser.add_argument("--ask", type=Path, metavar="FOLDER", help="be the client, with these certificates")
    args = parser.parse_args()
    server_at = Hosts(2, Path()).address(0)
    if args.serve:
        serve(args.serve, server_at)
    elif args.ask:
        print(json.dumps(ask(args.ask, server_at, args.steps)))
    else:
        records = measure(args.steps)
        args.out.write_text(json.dumps({"machine": machine(), "records": records}, indent=1) + "\n")
        print("\n".join(table(records)))


if __name__ == "__main__":
    main()
