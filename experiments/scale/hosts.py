"""The same run on several hosts: network namespaces of this machine, each with an address of its own and a Ray node.

    sudo python -m experiments.scale.hosts                   # writes hosts.json beside this file

Namespaces are joined by a bridge, or by `links.py` where `--delay` asks for latency. A process in one of them reaches
another only over TCP: a socket in Linux's abstract namespace belongs to one network namespace. Each host has its own
folder for temporary files. The result is compared with the run on one machine, to the bit.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.scale import links
from experiments.speed.run import environment, machine

HERE = Path(__file__).parent
BRIDGE = "fedsplit0"
NETWORK = "10.77.0"
PORT = 6379
FLAGS = shlex.split(
    "--clients 6 --rounds 4 --train.steps 4 --train.batch-size 4 --train.max-length 64 --eval.samples 4 --eval.after 0 "
    "--trunk.schedule copies"
)

_ECHO = """
import socket, sys
server = socket.create_server((sys.argv[1], 7777))
print("ready", flush=True)
connection, _ = server.accept()
while byte := connection.recv(1):
    connection.sendall(byte)
"""

_ASK = """
import socket, statistics, sys, time
connection = socket.create_connection((sys.argv[1], 7777))
times = []
for _ in range(20):
    began = time.perf_counter()
    connection.sendall(b"x")
    connection.recv(1)
    times.append(time.perf_counter() - began)
print(1000 * statistics.median(times))
"""


def run(*command: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end."""
    done = subprocess.run(command, text=True, capture_output=True, **options)
    if check and done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed: {done.stderr[-3000:] or done.stdout[-3000:]}")
    return done


class Hosts:
    """Network namespaces, with a Ray node each if asked for.

    Attributes:
        names: Names of the namespaces.
    """

    def __init__(self, count: int, scratch: Path, mbps: float = 0.0) -> None:
        """Makes the namespaces; the first one has the head of the cluster.

        Args:
            count: Number of hosts.
            scratch: Folder for the temporary files of all hosts.
            mbps: Bandwidth of each host's way out, in Mbit/s; 0 for no limit.
        """
        self._mbps = mbps
        self.names = [f"fedsplit-host{number}" for number in range(1, count + 1)]
        self._scratch = scratch

    @contextlib.contextmanager
    def up(self, delay: float, with_ray: bool = True) -> Iterator[None]:
        """Keeps hosts and cluster up inside the context.

        Args:
            delay: Latency of a packet between two hosts in ms.
            with_ray: True for a Ray node on each host.
        """
        numbers = range(len(self.names))
        with contextlib.ExitStack() as stack:
            stack.callback(self._remove)
            for name in self.names:
                run("ip", "netns", "add", name)
            if delay:
                stack.enter_context(self._links(delay))
            else:
                self._bridge()
            for number in numbers:
                self.on(number, "ip", "address", "add", f"{self.address(number)}/24", "dev", "eth0")
                self.on(number, "ip", "link", "set", "eth0", "mtu", str(links.MTU))
                for device in ("lo", "eth0"):
                    self.on(number, "ip", "link", "set", device, "up")
            for number in numbers if with_ray else ():
                self._start_ray(number)
            yield

    def _bridge(self) -> None:
        """Joins the hosts by a bridge of the kernel."""
        run("ip", "link", "add", BRIDGE, "mtu", str(links.MTU), "type", "bridge")
        run("ip", "link", "set", BRIDGE, "up")
        for number, name in enumerate(self.names):
            link = f"fedsplit-v{number}"
            run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
            run("ip", "link", "set", link, "mtu", str(links.MTU), "master", BRIDGE, "up")

    @contextlib.contextmanager
    def _links(self, delay: float) -> Iterator[None]:
        """Joins the hosts by links with latency, for as long as the context lasts."""
        command = [sys.executable, "-m", "experiments.scale.links", "--delay", str(delay), "--mbps", str(self._mbps)]
        carrier = subprocess.Popen([*command, *self.names], stdout=subprocess.PIPE, text=True)
        try:
            assert carrier.stdout is not None
            if carrier.stdout.readline() != "ready\n":
                raise RuntimeError("the links between the hosts could not be made")
            yield
        finally:
            carrier.kill()
            carrier.wait()

    def address(self, number: int) -> str:
        """Returns the IP address of a host."""
        return f"{NETWORK}.{number + 1}"

    def on(self, number: int, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs a command on a host."""
        folder = self._scratch / self.names[number]
        folder.mkdir(exist_ok=True)
        settings = {**environment(), "TMPDIR": str(folder)}
        return run("ip", "netns", "exec", self.names[number], *command, check=check, env=settings, cwd=folder)

    def round_trip(self) -> float:
        """Returns the median time in ms in which a byte goes from the second host to the first and back."""
        server = subprocess.Popen(
            ["ip", "netns", "exec", self.names[0], sys.executable, "-c", _ECHO, self.address(0)],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert server.stdout is not None
            server.stdout.readline()
            asked = self.on(1, sys.executable, "-c", _ASK, self.address(0))
        finally:
            server.kill()
            server.wait()
        return round(float(asked.stdout), 2)

    def _start_ray(self, number: int) -> None:
        ray = str(Path(sys.executable).with_name("ray"))
        place = ["--address", f"{self.address(0)}:{PORT}"]
        if number == 0:
            place = ["--head", "--port", str(PORT), "--temp-dir", str(self._scratch / "ray")]
            place += ["--include-dashboard", "false"]
        own = ["--node-ip-address", self.address(number), "--num-cpus", "2" if number == 0 else "1"]
        self.on(number, ray, "start", *place, *own, "--disable-usage-stats")

    def _remove(self) -> None:
        """Ends all processes of the hosts, and removes them."""
        for name in self.names:
            pids = run("ip", "netns", "pids", name, check=False).stdout.split()
            for pid in map(int, pids):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
            run("ip", "netns", "delete", name, check=False)
        for number in range(len(self.names)):  # the kernel removes the links of a namespace only after a while
            run("ip", "link", "delete", f"fedsplit-v{number}", check=False)
        run("ip", "link", "delete", BRIDGE, check=False)


def digest(folder: Path) -> str:
    """Returns the sha256 of the adapter that a run has left."""
    return hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def seconds_of(folder: Path) -> list[float]:
    """Returns the seconds of training of all rounds but the first."""
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [event["seconds"] for event in events if event["event"] == "train"][1:]


def packets_of(folder: Path) -> int:
    """Returns the packets that the trunk has got over sockets, and not through Ray's calls."""
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    packets: int = [event for event in events if event["event"] == "train"][-1]["trunk"]["over_socket"]
    return packets


def simulate(out: Path, extra: Sequence[str]) -> list[str]:
    """Returns the command of a run."""
    return [sys.executable, "-m", "fedsplit.simulate", *FLAGS, *extra, "--out", str(out)]


def tokens_of(folder: Path) -> list[int]:
    """Returns the tokens that clients trained on in all rounds but the first."""
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [event["tokens"] for event in events if event["event"] == "train"][1:]


def measure(hosts: int, delay: float, scratch: Path, more: Sequence[str] = ()) -> dict[str, Any]:
    """Runs once on hosts.

    Args:
        hosts: Number of hosts.
        delay: Latency of a packet between two hosts in ms.
        scratch: Folder for the temporary files of all hosts.
        more: Further flags of the run.
    """
    out = scratch / "run"
    cluster = Hosts(hosts, scratch)
    with cluster.up(delay):
        round_trip = cluster.round_trip() if hosts > 1 else None
        extra = ["--ray.address", f"{cluster.address(0)}:{PORT}", *more]
        done = cluster.on(0, *simulate(out, extra), check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        table = [line for line in done.stdout.splitlines() if line.startswith(NETWORK)]
    found = {"hosts": hosts, "delay_ms": delay, "train": seconds_of(out), "over_socket": packets_of(out)}
    if round_trip is not None:
        found["round_trip_ms"] = round_trip
    return {**found, "tokens": tokens_of(out), "sha256": digest(out), "nodes": table}


def main() -> None:
    """Measures, and compares the adapters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "hosts.json")
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--delay", type=float, nargs="+", default=[0.0, 1.0, 10.0])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="h", dir="/tmp") as scratch:
        alone = Path(scratch) / "alone"
        run(*simulate(alone, ["--workers", "2"]), env=environment())
        expected = digest(alone)
        records: list[dict[str, Any]] = [{"hosts": "local", "train": seconds_of(alone), "sha256": expected}]
    for hosts in args.hosts:
        for delay in args.delay if hosts > 1 else [0.0]:
            with tempfile.TemporaryDirectory(prefix="h", dir="/tmp") as scratch:
                record = measure(hosts, delay, Path(scratch))
            record["equal"] = record.get("sha256") == expected
            records.append(record)
            print(json.dumps(record), flush=True)
            result = {"machine": machine(), "flags": FLAGS, "records": records}
            args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
