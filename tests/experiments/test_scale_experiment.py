"""The experiments on scale: their data, their table, and the hosts' commands."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.scale import clients, hosts


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
