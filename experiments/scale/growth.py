"""Time of a round on one, two and three hosts: at the same work, and at work that grows with the hosts.

    sudo python -m experiments.scale.growth                   # writes growth.json beside this file, and the table

The hosts are those of `experiments.scale.hosts`: network namespaces of this machine, with a Ray node each. The first
host has the trunk, and each host one client process with one thread.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.scale import hosts
from experiments.speed.run import machine

HERE = Path(__file__).parent
CLIENTS = 6
"""Clients at the same work; at growing work there are as many for each three hosts."""


def plans(counts: Sequence[int]) -> list[tuple[str, int, int]]:
    """Returns kind of work, hosts and clients of each measurement."""
    return [
        *(("fixed", count, CLIENTS) for count in counts),
        *(("growing", count, CLIENTS * count // 3) for count in counts),
    ]


def table(records: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the rows of a table: time of a round's training, tokens a second, and how much faster than one host.

    The fastest round counts: others may have shared the cores with other programs.
    """
    lines = [
        "| work | hosts | clients | fastest training of a round, s | tokens/s | against one host |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    alone: dict[str, float] = {}
    for record in records:
        seconds, tokens = min(zip(record["train"], record["tokens"], strict=True))
        speed = tokens / seconds
        first = alone.setdefault(record["work"], speed)
        lines.append(
            f"| {record['work']} | {record['hosts']} | {record['clients']} | {seconds:.2f} | {speed:,.0f} | "
            f"{speed / first:.2f} |"
        )
    return lines


def main() -> None:
    """Measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "growth.json")
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    records = []
    for work, count, clients in plans(args.hosts):
        more = ["--clients", str(clients), "--rounds", str(args.rounds)]
        with tempfile.TemporaryDirectory(prefix="h", dir="/tmp") as scratch:
            found = hosts.measure(count, 0.0, Path(scratch), more)
        records.append({"work": work, "clients": clients, **found})
        result = {"machine": machine(), "flags": hosts.FLAGS, "records": records}
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(table(records)))


if __name__ == "__main__":
    main()
