"""A step of a real run by door: the trunk of the run's own, over the local socket, and one at a server over gRPC.

    python -m experiments.doors.steps                       # writes steps.json beside this file, and the table

One client trains, so that no step waits for another client's. Runs by the doors take turns. The first round, in which
processes warm up, is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.speed.run import environment, machine

HERE = Path(__file__).parent
STEPS = 40
SETTINGS = f"""
clients = 1
rounds = 3
workers = 1
report = false

[train]
steps = {STEPS}
max_length = 64
micro_batches = 1

[eval]
after = 0
samples = 4
"""

DOORS = ("local socket", "gRPC", "gRPC, TLS")


@contextlib.contextmanager
def served(folder: Path, *flags: str) -> Iterator[list[str]]:
    """Keeps a trunk's server up inside the context, and yields the flags of runs at the server."""
    call = [sys.executable, "-m", "fedsplit", "serve", "--run", "run.toml", "--port", "0", *flags]
    with subprocess.Popen(call, cwd=folder, stdout=subprocess.PIPE, text=True, env=environment()) as server:
        assert server.stdout is not None
        ready = re.match(r"trunk ready at (\S+):", server.stdout.readline())
        if ready is None:
            raise RuntimeError("the server is not ready")
        try:
            yield ["--trunk.server", ready[1], "--trunk.token-file", "run.token"]
        finally:
            server.terminate()


def seconds_of(folder: Path, run: str, flags: Sequence[str]) -> list[float]:
    """Returns the seconds of a step in each round of a run but the first."""
    call = [
        sys.executable,
        "-m",
        "fedsplit",
        "simulate",
        "--config",
        "run.toml",
        "--engine",
        "ray",
        "--out",
        run,
        *flags,
    ]
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True, env=environment())
    if done.returncode:
        raise RuntimeError(done.stderr)
    events = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
    return [event["seconds"] / STEPS for event in events if event["event"] == "train"][1:]


def measure(repeats: int) -> dict[str, list[float]]:
    """Returns the seconds of a step by door."""
    found: dict[str, list[float]] = {door: [] for door in DOORS}
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as servers:
        folder = Path(scratch)
        (folder / "run.toml").write_text(SETTINGS)
        call = [sys.executable, "-m", "fedsplit", "certificates", "set", "--clients", "client"]
        subprocess.run(call, cwd=folder, check=True, capture_output=True, env=environment())
        flags = {
            "local socket": [],
            "gRPC": servers.enter_context(served(folder)),
            "gRPC, TLS": [*servers.enter_context(served(folder, "--tls", "set/trunk")), "--trunk.tls", "set"],
        }
        for repeat in range(repeats):
            for number, door in enumerate(DOORS):
                found[door] += seconds_of(folder, f"run-{repeat}-{number}", flags[door])
    return found


def table(found: dict[str, list[float]]) -> list[str]:
    """Returns the lines of the table."""
    lines = ["| door | a step, ms | to the socket |", "|---|---:|---:|"]
    base = statistics.median(found[DOORS[0]])
    for door, seconds in found.items():
        median = statistics.median(seconds)
        lines.append(f"| {door} | {median * 1e3:.1f} | {median / base:.2f} |")
    return lines


def main() -> None:
    """Measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "steps.json")
    parser.add_argument("--repeats", type=int, default=4)
    args = parser.parse_args()
    found: dict[str, Any] = measure(args.repeats)
    args.out.write_text(json.dumps({"machine": machine(), "seconds": found}, indent=1) + "\n")
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
