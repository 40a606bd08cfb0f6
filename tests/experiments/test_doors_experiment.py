"""The experiments on doors: each measures in small, and the tables say what was measured."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from grpc_parties import at

from experiments.doors import distance, load, packets
from experiments.doors.certificates import make_folders
from fedsplit.wire.grpc_client import GrpcClient
from fedsplit.wire.grpc_server import GrpcServer
from fedsplit.wire.identities import read_identities
from fedsplit.wire.packets import Packet, StepKey
from fedsplit.wire.tls import problem


def test_a_packet_has_the_bytes_that_the_table_says() -> None:
    assert [packets.packet_of(size).nbytes for size in packets.SIZES] == list(packets.SIZES)


def test_a_row_has_medians_and_ratios_to_the_socket() -> None:
    records = [
        {"door": "socket", "bytes": 4000, "seconds": [0.002, 0.001, 0.009]},
        {"door": "gRPC", "bytes": 4000, "seconds": [0.005, 0.005, 0.001]},
    ]
    assert packets.table(records)[2:] == ["| 4,000 | 2.00 (1.0) | 5.00 (2.5) |"]


def test_the_certificates_serve_both_sides(tmp_path: Path) -> None:
    make_folders(tmp_path, ["one", "two"])
    assert [problem(tmp_path / name) for name in ("server", "one", "two")] == ["", "", ""]
    assert read_identities(tmp_path / "server").clients == {"one": 0, "two": 1}


def test_a_step_is_as_long_as_its_longest_part() -> None:
    nothing = float("inf")
    compute, micros = distance.COMPUTE_SECONDS, distance.MICROS
    assert distance.bound(0.0, nothing, 1) == pytest.approx(micros * compute)
    assert distance.bound(0.1, nothing, 1) == pytest.approx(micros * (compute + 0.2))
    assert distance.bound(0.1, nothing, micros) == pytest.approx(micros * compute + 0.2)
    # Four begin at 0, 10, 20 and 30 ms; the other four with the answers, the last one at 240 ms.
    assert distance.bound(0.1, nothing, 4) == pytest.approx(0.24 + compute + 0.2)
    slow = distance.STEP_BYTES / micros  # a micro-batch a second
    assert distance.bound(0.0, slow, micros) == pytest.approx(micros + 1 + compute)


def test_in_flight_micro_batches_wait_for_their_answers() -> None:
    class Trunk:
        waiting = 0
        most = 0

        def send(self, packet: Packet):
            self.waiting += 1
            self.most = max(self.most, self.waiting)
            return self.answer

        def answer(self) -> None:
            self.waiting -= 1

    for count in (1, 3, 8):
        trunk = Trunk()
        distance.play(trunk, count, 2, wait=lambda seconds: None)
        assert (trunk.most, trunk.waiting) == (count, 0)


def test_a_proxy_holds_packets_back() -> None:
    server = GrpcServer(lambda packet, done: done(packet), token=b"the token of the run")
    proxy = distance.Proxy(server.port, latency=0.05, rate=2e6)
    client = GrpcClient(at(proxy.port), 0)
    client.send(Packet(StepKey(1, 0, 0)))()
    began = time.monotonic()
    client.send(packets.packet_of(200_000))()
    assert time.monotonic() - began > 0.29  # two crossings of 0.05 s for the latency, and 0.1 s for the bytes
    client.close()
    proxy.close()
    server.close()


@pytest.mark.slow
def test_the_load_is_counted_on_both_sides(tmp_path: Path) -> None:
    record = load.measure(clients=3, seconds=1.0, size=4000, processes=2)
    assert record["packets"] > 0 and record["fewest"] > 0
    assert (record["lost"], record["doubled"], record["wrong"]) == (0, 0, 0)
    assert "lost 0, doubled 0, wrong answers 0" in load.table(record)
