"""The experiments on scale: their data, their table, and the hosts' commands."""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path

import pytest

from experiments.scale import clients, growth, hosts, links, packets, projection, trunks


def test_every_registered_client_has_two_texts_of_its_own(tmp_path: Path) -> None:
    clients.write_data(tmp_path / "data.jsonl", 30)
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    assert len(rows) == len({row["text"] for row in rows}) == 60
    assert len({row["owner"] for row in rows}) == 30


def test_a_row_has_the_medians_and_the_memory_by_role() -> None:
    record = {
        "clients": 10000,
        "before": 31.6,
        "train": [3.0, 4.0, 9.0],
        "evaluate": [0.2, 0.1, 0.3],
        "round": [5.0, 5.5, 6.0],
        "memory": {"command": 734e6, "client": 513e6},
    }
    assert clients.row(record) == "| 10,000 | 4.00 | 0.20 | 5.50 | 734 | 513 | 0 | 32 |"


def test_the_first_round_of_a_run_is_warm_up(tmp_path: Path) -> None:
    events = [{"event": "train", "seconds": seconds, "trunk": {"over_socket": 9 * seconds}} for seconds in (5, 1, 2)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*events, {"event": "evaluate"}])))
    assert hosts.seconds_of(tmp_path) == [1, 2]
    assert hosts.packets_of(tmp_path) == 18


def test_hosts_have_addresses_of_their_own(tmp_path: Path) -> None:
    made = hosts.Hosts(3, tmp_path)
    assert [made.address(number) for number in range(3)] == ["10.77.0.1", "10.77.0.2", "10.77.0.3"]
    assert len(set(made.names)) == 3


def test_work_stays_or_grows_with_the_hosts() -> None:
    assert growth.plans([1, 3]) == [("fixed", 1, 6), ("fixed", 3, 6), ("growing", 1, 2), ("growing", 3, 6)]
    records = [
        {"work": "fixed", "hosts": 1, "clients": 6, "train": [2.0, 9.0, 2.0], "tokens": [1000, 1000, 1000]},
        {"work": "fixed", "hosts": 2, "clients": 6, "train": [1.0, 1.0, 1.0], "tokens": [1000, 1000, 1000]},
    ]
    assert growth.table(records)[2:] == [
        "| fixed | 1 | 6 | 2.00 | 500 | 1.00 |",
        "| fixed | 2 | 6 | 1.00 | 1,000 | 2.00 |",
    ]


def test_a_packet_costs_what_a_line_through_its_bytes_says() -> None:
    records = [
        {"tls": tls, "bytes": size, "seconds": 0.5 + size * (1 + tls)} for tls in (0, 1) for size in (10, 20, 40)
    ]
    records = [{**record, "tls": bool(record["tls"])} for record in records]
    assert packets.costs(records, tls=False) == (0.5, 1.0) and packets.costs(records, tls=True) == (0.5, 2.0)
    found = packets.measure("", (2**12, 2**14), repeats=2)
    assert [record["bytes"] for record in found] == [2**12, 2**14] and all(record["seconds"] > 0 for record in found)


def test_a_projection_is_worked_by_hand() -> None:
    """One block of width 10 at the client, one at the trunk: 1,200 weights each, and 2,000 of the head."""
    shape = projection.Shape("small", 2, 10, 200, 1)
    tokens = 4 * 512
    assert shape.operations(1, has_head=False) == 4 * 1200 * tokens
    assert shape.operations(1, has_head=True) == 4 * 3200 * tokens
    assert shape.packet == 2 * tokens * 10
    row = projection.project(shape, 16, projection.Costs(message=0.1, byte=0.0, between=0.25))
    crossing = 2 * (0.1 + 2 * shape.packet / (25e9 / 8))
    step = crossing + 4 * (1200 + 3200) * tokens / (989e12 * 0.3)
    assert row["limit"] == "clients" and row["training"] == pytest.approx(10 * 2 * step)  # two turns of eight GPUs
    assert row["between"] == 4.0
    assert row["tokens_per_second"] == pytest.approx(16 * 10 * tokens / (row["training"] + 4.0))


def test_the_committed_costs_are_read_and_the_table_has_all_rows() -> None:
    costs = projection.read_costs()
    assert 0 < costs.message < 0.01 and 0 < costs.byte < 1e-7 and 0 < costs.between < 0.1
    assert len(projection.table(costs)) == 2 + 2 * 3


def test_a_row_of_trunks_compares_with_one_trunk_of_the_same_schedule_and_says_whether_adapters_are_equal() -> None:
    def record(case: str, speed: float, adapter: str = "a", between: int = 0) -> dict[str, object]:
        return {"case": case, "speed": [speed], "memory": 500e6, "between_stages": between, "adapter": adapter}

    records = [record("one trunk", 100.0), record("one trunk, batched", 200.0)]
    records += [record("2 stages", 90.0, between=2_500_000), record("2 replicas", 110.0, "b")]
    records += [record("2 replicas, batched, as one", 100.0, "c")]
    assert trunks.rows(records) == [
        "| one trunk | 1.00 | 500 | 0.0 | equal to the bit |",
        "| 2 stages | 0.90 | 500 | 2.5 | equal to the bit |",
        "| 2 replicas | 1.10 | 500 | 0.0 | DIFFERENT |",
        "| one trunk, batched | 1.00 | 500 | 0.0 |  |",
        "| 2 replicas, batched, as one | 0.50 | 500 | 0.0 |  |",
    ]


def test_packets_of_a_link_wait_for_each_other_and_for_the_latency() -> None:
    link = links.Link(delay=0.5, bytes_a_second=100.0)
    assert [link.arrival(50, now) for now in (1.0, 1.0, 9.0)] == [2.0, 2.5, 10.0]
    free = links.Link(delay=0.5, bytes_a_second=0.0)
    assert [free.arrival(50, now) for now in (1.0, 1.0)] == [1.5, 1.5]


def test_a_packet_reaches_the_host_of_its_address_when_the_latency_is_over() -> None:
    ends = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(3)]
    for inside, _ in ends:
        inside.setblocking(False)
    devices = [inside.fileno() for inside, _ in ends]
    ways = [links.Link(0.05, 0.0) for _ in ends]
    threading.Thread(target=links.carry, args=(devices, ways), daemon=True).start()
    to_third = bytes([0x45, *bytes(15), 10, 77, 0, 3])
    began = time.monotonic()
    ends[0][1].send(b"\x60" + bytes(39))  # of IPv6, which the hosts do not use
    ends[0][1].send(bytes([0x45, *bytes(15), 10, 77, 0, 9]))  # to nobody
    ends[0][1].send(to_third)
    ends[2][1].settimeout(30)
    assert ends[2][1].recv(100) == to_third
    assert time.monotonic() - began >= 0.05
