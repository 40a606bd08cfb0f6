"""The same run on several hosts: network namespaces of this machine, each with an address of its own and a Ray node.

    sudo python -m experiments.scale.hosts                   # writes hosts.json beside this file

Namespaces are joined by a bridge. A process in one of them reaches another only over TCP: a socket in Linux's abstract
namespace belongs to one network namespace. Each host has its own folder for temporary files. `--delay` adds latency by
`tc netem`, where the kernel has it. The result is compared with the run on one machine, to the bit.
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

from experiments.speed.run import environment, machine

HERE = Path(__file__).parent
BRIDGE = "fedsplit0"
NETWORK = "10.77.0"
PORT = 6379
FLAGS = shlex.split(
    "--clients 6 --rounds 4 --train.steps 4 --train.batch-size 4 --train.max-length 64 --eval.samples 4 --eval.after 0 "
    "--trunk.schedule copies"
)


def run(*command: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end."""
    done = subprocess.run(command, text=True, capture_output=True, **options)
    if check and done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed: {done.stderr[-3000:] or done.stdout[-3000:]}")
    return done


class Hosts:
    """Network namespaces with a Ray node each.

    Attributes:
        names: Names of the namespaces.
    """

    def __init__(self, count: int, scratch: Path) -> None:
        """Makes the namespaces; the first one has the head of the cluster.

        Args:
            count: Number of hosts.
            scratch: Folder for the temporary files of all hosts.
        """
        self.names = [f"fedsplit-host{number}" for number in range(1, count + 1)]
        self._scratch = scratch

    @contextlib.contextmanager
    def up(self, delay: float) -> Iterator[bool]:
        """Keeps hosts and cluster up inside the context.

        Args:
            delay: Latency of each host's link in ms, in the direction away from the host.

        Yields:
            False if the kernel cannot delay packets.
        """
        try:
            run("ip", "link", "add", BRIDGE, "type", "bridge")
            run("ip", "link", "set", BRIDGE, "up")
            delays = [self._add(number, delay) for number in range(len(self.names))]
            for number in range(len(self.names)):
                self._start_ray(number)
            yield all(delays)
        finally:
            self._remove()

    def _add(self, number: int, delay: float) -> bool:
        """Adds a host; returns whether its packets are delayed as asked."""
        name, link = self.names[number], f"fedsplit-v{number}"
        run("ip", "netns", "add", name)
        run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        run("ip", "link", "set", link, "master", BRIDGE, "up")
        self.on(number, "ip", "address", "add", f"{self.address(number)}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            self.on(number, "ip", "link", "set", device, "up")
        if not delay:
            return True
        done = self.on(number, *f"tc qdisc add dev eth0 root netem delay {delay}ms".split(), check=False)
        return done.returncode == 0

    def address(self, number: int) -> str:
        """Returns the IP address of a host."""
        return f"{NETWORK}.{number + 1}"

    def on(self, number: int, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs a command on a host."""
        folder = self._scratch / self.names[number]
        folder.mkdir(exist_ok=True)
        settings = {**environment(), "TMPDIR": str(folder)}
        return run("ip", "netns", "exec", self.names[number], *command, check=check, env=settings, cwd=folder)

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


def measure(hosts: int, delay: float, scratch: Path) -> dict[str, Any]:
    """Runs once on hosts."""
    out = scratch / "run"
    cluster = Hosts(hosts, scratch)
    with cluster.up(delay) as delayed:
        if not delayed:
            return {"hosts": hosts, "delay_ms": delay, "left_out": "the kernel has no netem"}
        extra = ["--ray.address", f"{cluster.address(0)}:{PORT}"]
        done = cluster.on(0, *simulate(out, extra), check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        table = [line for line in done.stdout.splitlines() if line.startswith(NETWORK)]
    found = {"hosts": hosts, "delay_ms": delay, "train": seconds_of(out), "over_socket": packets_of(out)}
    return {**found, "sha256": digest(out), "nodes": table}


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
