"""The virtual clock beside real packets: steps between network namespaces, predicted and measured.

    sudo python -m experiments.network.real         # writes real.json beside this file

The trunk runs in one namespace, and each client in one of its own. `experiments/scale/links.py` carries the packets
between them, with a latency for each packet and a bandwidth for each host's way out; TCP above is the kernel's own.
The clients begin together and make the same steps. The prediction is the virtual clock's, from the trunk's trace of
these very steps. Its compute times are a profile of this machine, scaled for each round so that each client and the
trunk compute as long as they did: the comparison is about the network, and not about what else the machine does.
Adapters are not sent.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.scale import links
from experiments.scale.hosts import Hosts
from experiments.speed.run import environment, machine
from fedsplit.adaptation.run_adapters import adapt, bare_parts
from fedsplit.client.client import Client
from fedsplit.client.link import Link
from fedsplit.corpora.shards import Shard
from fedsplit.federation.compute_profile import measured
from fedsplit.network.compute import RecordedCompute, Task, read_recorded
from fedsplit.network.fleet import TrunkLink
from fedsplit.network.profiles import Profile
from fedsplit.network.replay import ClientPhase, Field, replay
from fedsplit.network.trace import Crossing, settled
from fedsplit.settings.documents import build
from fedsplit.trunk import port
from fedsplit.trunk.requests import Answer, Done
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.trunk.service import load_service
from fedsplit.trunk.workers import run_until_defect
from fedsplit.wire.codecs import make_codec
from fedsplit.wire.packets import Packet, StepKey
from fedsplit.wire.socket_server import PacketServer
from fedsplit.wire.sockets import Address, PacketClient
from fedsplit.wire.transport import PendingAnswer

HERE = Path(__file__).parent
POINTS = ((10.0, 20.0), (50.0, 20.0), (10.0, 8.0), (50.0, 8.0), (100.0, 8.0))
"""Latency of a packet in ms, and bandwidth of each host's way out in Mbit/s."""

STEPS = 5
ROUNDS = 4

SETTINGS: dict[str, Any] = {
    "train.batch_size": 4,
    "train.max_length": 64,
    "trunk.schedule": "copies",
    "network.profile": "lan",  # any: it makes the trunk keep a trace
    "threads": 1,
}


def _settings(micro_batches: int) -> dict[str, Any]:
    return {**SETTINGS, "train.micro_batches": micro_batches}


class _Busy:
    """Seconds in which the trunk has work, from the arrival of a message to its answer. Messages may overlap."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._messages = 0
        self._since = 0.0
        self._seconds = 0.0

    def begin(self) -> None:
        """Notes the arrival of a message."""
        with self._lock:
            if not self._messages:
                self._since = time.monotonic()
            self._messages += 1

    def end(self) -> None:
        """Notes an answer."""
        with self._lock:
            self._messages -= 1
            if not self._messages:
                self._seconds += time.monotonic() - self._since

    def take(self) -> float:
        """Returns the seconds since the last call."""
        with self._lock:
            seconds, self._seconds = self._seconds, 0.0
        return seconds


def _serve(host: str, micro_batches: int) -> None:
    """Serves steps at an address; prints it, and the trace of a round whenever a line comes."""
    torch.set_num_threads(1)
    service = load_service(build(_settings(micro_batches)), "real", "first")
    threading.Thread(target=run_until_defect, args=(service.work, 1), daemon=True).start()
    busy = _Busy()

    def submit(packet: Packet, done: Done) -> None:
        def answered(answer: Answer) -> None:
            busy.end()
            done(answer)

        busy.begin()
        service.submit(packet, answered)

    server = PacketServer(submit, host)
    print(json.dumps({"token": server.address.token.hex(), "port": server.address.port}), flush=True)
    for _ in sys.stdin:
        taken: list[Any] = []
        done = threading.Event()

        def reply(trace: Any, taken: list[Any] = taken, done: threading.Event = done) -> None:
            taken.append(trace)
            done.set()

        service.request(port.TakeTrace(), reply)
        done.wait()
        trace = [vars(crossing) for crossing in taken[0]]
        print(json.dumps({"trace": trace, "busy": busy.take()}), flush=True)


class _Trunk:
    """The way to the trunk over a socket, which notes how long the client waits.

    Attributes:
        waited: Seconds that the client has waited for answers.
    """

    def __init__(self, client: PacketClient) -> None:
        self._client = client
        self.waited = 0.0

    def send(self, packet: Packet) -> PendingAnswer:
        """Sends a packet, and returns a function that waits for the answer."""
        pending = self._client.send(packet)

        def wait() -> Packet:
            began = time.monotonic()
            answer = pending()
            self.waited += time.monotonic() - began
            return answer

        return wait

    def leave(self, client: int) -> None:
        """Says nothing: rounds end here without the server."""


def _play(number: int, address: Address, micro_batches: int) -> None:
    """Makes the steps of a round whenever a line comes, and prints their seconds."""
    torch.set_num_threads(1)
    config = build(_settings(micro_batches))
    bottom, top = bare_parts(config, ["bottom", "top"])
    for part in (bottom, top):
        adapt(part, config)
        part.train()
    trunk = _Trunk(PacketClient(address))
    link = Link(trunk, make_codec("raw"), SCHEDULES["copies"], "real", "first")
    nobody: Any = None  # its shard, which single steps do not read
    shard: Shard = nobody
    client = Client(number, shard, bottom, top, link, config.train, config.seed)
    shape = (config.train.batch_size, config.train.max_length)
    ids = torch.arange(shape[0] * shape[1]).reshape(shape) % bottom.config.vocab_size
    print("ready", flush=True)
    for round, _ in enumerate(sys.stdin, start=1):
        began = time.monotonic()
        trunk.waited = 0.0
        for step in range(STEPS):
            client.step(ids, StepKey(round, number, step))
        seconds = time.monotonic() - began
        print(json.dumps({"seconds": seconds, "computed": seconds - trunk.waited}), flush=True)


class Sites(Hosts):
    """The trunk's host, and a host for each client, joined by links with latency and bandwidth. No Ray runs."""

    def _start_ray(self, number: int) -> None:
        """Starts nothing."""

    def start(self, number: int, *arguments: str) -> subprocess.Popen[str]:
        """Starts this module on a host, with pipes to it."""
        command = ["ip", "netns", "exec", self.names[number], sys.executable, "-m", "experiments.network.real"]
        pipe = subprocess.PIPE
        return subprocess.Popen([*command, *arguments], stdin=pipe, stdout=pipe, text=True, env=environment())


def _asked(process: subprocess.Popen[str], line: str = "go\n") -> None:
    assert process.stdin is not None
    process.stdin.write(line)
    process.stdin.flush()


def _told(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    line = process.stdout.readline()
    return line.strip() if line == "ready\n" else json.loads(line)


def predict(
    by_client: Mapping[int, Sequence[Crossing]],
    played: Sequence[Mapping[str, float]],
    busy: float,
    mbps: float,
    round_trip: float,
    compute: str,
) -> dict[int, float]:
    """Returns the seconds of each client's steps by the virtual clock.

    Args:
        by_client: The trace of the round, by client.
        played: What each client says of its round: the seconds that it "computed".
        busy: Seconds in which the trunk had work.
        mbps: Bandwidth of each host's way out in Mbit/s.
        round_trip: Round-trip time in ms.
        compute: Recorded compute times, as JSON.
    """
    recorded = read_recorded(compute)
    everything = [one for own in by_client.values() for one in own]
    of_trunk = sum(recorded.seconds(_TRUNK_TASKS[one.kind], one.rows, one.length) for one in everything)
    scaled = {
        task: seconds * (busy / of_trunk if task.startswith("trunk") else 1.0)
        for task, seconds in recorded.seconds_of_token.items()
    }
    profiles = []
    for client, own in sorted(by_client.items()):
        tasks = [(task, one) for one in own for task in _CLIENT_TASKS[one.kind]]
        expected = sum(recorded.seconds(task, one.rows, one.length) for task, one in tasks)
        factor = expected / played[client]["computed"]
        profiles.append(Profile(uplink_mbps=mbps, downlink_mbps=1e6, rtt_ms=round_trip, compute=factor))
    place = Field(profiles, TrunkLink(uplink_mbps=mbps, downlink_mbps=1e6), RecordedCompute(scaled))
    phases = {client: ClientPhase(0, 0, own) for client, own in by_client.items()}
    arrivals = replay(place, phases, round=1, phase="training").arrivals
    # Without adapters, request and answer of a phase are two empty messages, which nobody sends here.
    return {client: seconds - round_trip / 1000 for client, seconds in arrivals.items()}


_TRUNK_TASKS: Mapping[str, Task] = {"forward": "trunk-forward", "backward": "trunk-backward"}

_CLIENT_TASKS: Mapping[str, tuple[Task, ...]] = {
    "forward": ("bottom-forward", "top-forward", "top-backward"),
    "backward": ("bottom-backward",),
}


def measure(clients: int, delay: float, mbps: float, micro_batches: int, compute: str) -> dict[str, Any]:
    """Returns the seconds of all clients' steps, round by round: predicted and measured.

    Args:
        clients: Number of clients.
        delay: Latency of a packet in ms.
        mbps: Bandwidth of each host's way out in Mbit/s.
        micro_batches: Micro-batches of a step.
        compute: Recorded compute times, as JSON.
    """
    rounds: list[tuple[list[dict[str, float]], dict[str, Any]]] = []
    with tempfile.TemporaryDirectory(prefix="n", dir="/tmp") as scratch:
        sites = Sites(1 + clients, Path(scratch), mbps)
        with sites.up(delay):
            round_trip = sites.round_trip()
            trunk = sites.start(0, "--serve", sites.address(0), "--micro-batches", str(micro_batches))
            where = _told(trunk)
            players = []
            for number in range(clients):
                door = [str(number), sites.address(0), str(where["port"]), where["token"]]
                players.append(sites.start(1 + number, "--play", *door, "--micro-batches", str(micro_batches)))
            for player in players:
                _told(player)
            for _ in range(ROUNDS):
                for player in players:
                    _asked(player)
                played = [_told(player) for player in players]
                _asked(trunk)
                rounds.append((played, _told(trunk)))
    del rounds[0]  # it warms up memory and connections
    seconds = [[one["seconds"] for one in played] for played, _ in rounds]
    predicted = []
    for number, (played, served) in enumerate(rounds, start=2):
        by_client = settled([Crossing(**fields) for fields in served["trace"]], number, range(clients))
        arrivals = predict(by_client, played, served["busy"], mbps, round_trip, compute)
        predicted.append([arrivals[client] for client in range(clients)])
    slowest = [max(own) for own in seconds]
    found = statistics.median(slowest)
    expected = statistics.median(max(own) for own in predicted)
    return {
        "clients": clients,
        "delay_ms": delay,
        "mbps": mbps,
        "micro_batches": micro_batches,
        "round_trip_ms": round_trip,
        "measured": found,
        "predicted": expected,
        "ratio": found / expected,
        "measured_rounds": seconds,
        "predicted_rounds": predicted,
        "load": os.getloadavg()[0],
    }


def _parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "real.json")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--points", nargs="+", default=[f"{delay:g},{mbps:g}" for delay, mbps in POINTS])
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--serve", metavar="HOST", help="used by this program: runs the trunk")
    parser.add_argument("--play", nargs=4, metavar="", help="used by this program: runs a client")
    return parser.parse_args(argv)


def main() -> None:
    """Measures all points, or plays a party of a measurement."""
    args = _parse()
    if args.serve:
        _serve(args.serve, args.micro_batches[0])
        return
    if args.play:
        number, host, door, token = args.play
        _play(int(number), Address("elsewhere", bytes.fromhex(token), host, int(door)), args.micro_batches[0])
        return
    torch.set_num_threads(1)
    records: list[dict[str, Any]] = []
    times = measured(build(SETTINGS))
    for clients, micro_batches, point in itertools.product(args.clients, args.micro_batches, args.points):
        delay, mbps = map(float, point.split(","))
        record = measure(clients, delay, mbps, micro_batches, json.dumps(times))
        records.append(record)
        shown = {key: value for key, value in record.items() if not key.endswith("_rounds")}
        print(json.dumps(shown), flush=True)
        result = {"machine": machine(), "mtu": links.MTU, "steps": STEPS, "settings": SETTINGS, "records": records}
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
