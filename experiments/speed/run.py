"""Measures split learning against the same training without a split, side by side.

    python -m experiments.speed.run --cache runs/speed-cache

A repeat measures every side once, one after the other, so that a busy hour of the machine meets all of them;
a side is always compared with `whole` of the same repeat. Writes `result.json` after every measurement.
Sides, beside flags of fedsplit that only they are given ("fedsplit-8 --wire.codec bf16"):

    whole       the unsplit model in one process, with a thread a core
    fedsplit-N  N clients, by the command a user would type
    pair        two processes with the whole model each, sharing the cores
    flower      eight clients with the whole model each, by Flower's FedAvg in its simulation engine
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from experiments.speed.models import folder_of
from experiments.speed.watch import Tree, follow
from fedsplit.environment import available_cores

HERE = Path(__file__).parent
SIDES = ("whole", "fedsplit-1", "fedsplit-4", "fedsplit-8", "pair", "flower")
FLOWER_CLIENTS = 8
CORES = available_cores()


def environment() -> dict[str, str]:
    """That of every command: this checkout is imported, and nothing is looked for on the network."""
    root = HERE.parent.parent
    return {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


class Bench:
    """The measurements of one model in one type.

    Attributes:
        model: Its table in the configuration.
        dtype: "fp32" or "bf16".
        scratch: Where runs write.
    """

    def __init__(self, model: Mapping[str, Any], dtype: str, folder: str, warmup: int, scratch: Path) -> None:
        self.model, self.dtype, self._folder, self._warmup, self.scratch = model, dtype, folder, warmup, scratch

    def flags(self, clients: int) -> list[str]:
        """fedsplit's flags of a run in which so many clients share a round's steps."""
        model = self.model
        settings = {
            "model": self._folder,
            "cut": model["cut"],
            "clients": clients,
            "rounds": model["rounds"],
            "train.steps": model["steps"] // clients,
            "train.batch-size": model["batch_size"],
            "train.max-length": model["max_length"],
            "eval.samples": 1,
        }
        return [word for name, value in settings.items() for word in (f"--{name}", str(value))]

    def measure(self, side: Sequence[str]) -> dict[str, Any]:
        """Measures a side, given by its name and flags of its own."""
        name, *extra = side
        if name == "whole":
            return self._workers(1)
        if name == "pair":
            return self._workers(2)
        if name == "flower":
            return self._flower()
        return self._fedsplit(int(name.removeprefix("fedsplit-")), extra)

    def _workers(self, count: int) -> dict[str, Any]:
        """Processes that train whole models at the same time; their speeds are added."""
        steps = self.model["steps"] * (self.model["rounds"] - 1) // count
        options = {"threads": max(1, CORES // count), "steps": steps, "warmup": self._warmup, "dtype": self.dtype}
        command = [sys.executable, "-m", "experiments.speed.whole", "--workers", str(count)]
        command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
        with contextlib.ExitStack() as stack:
            workers = [
                stack.enter_context(_worker([*command, "--worker", str(number), "--", *self.flags(FLOWER_CLIENTS)]))
                for number in range(count)
            ]
            trees = [Tree(worker.pid) for worker in workers]
            for worker in workers:
                _answer(worker)
            for worker in workers:
                assert worker.stdin is not None
                worker.stdin.write("go\n")
                worker.stdin.flush()
            results = [json.loads(_answer(worker)) for worker in workers]
            cpu = sum(tree.look() for tree in trees)
            peaks = [tree.peak_memory["command"] for tree in trees]
        tokens = sum(result["tokens"] for result in results)
        # Of workers that end at different times the speeds add, the times do not.
        speed = sum(result["tokens"] / result["seconds"] for result in results)
        return {
            "tokens": tokens,
            "seconds": tokens / speed,
            "cpu_seconds": sum(result["cpu_seconds"] for result in results),
            "cpu_seconds_of_command": cpu,
            "peak_memory": {"worker": max(peaks)},
            "loss": [result["loss"] for result in results],
        }

    def _federation(self, command: list[str], log: Path) -> dict[str, Any]:
        """A command that logs its rounds; those from the second on are what is measured."""
        events, tree = follow([sys.executable, "-m", *command], log, environment(), self.scratch / "output")
        rounds, before = [], 0.0
        for event in events:
            if event["event"] == "train":
                measured = {name: event[name] for name in ("round", "tokens", "seconds", "loss")}
                rounds.append({**measured, "cpu_seconds": event["cpu"] - before})
            before = event["cpu"]
        if len(rounds) != self.model["rounds"]:
            raise RuntimeError(f"{len(rounds)} rounds of {self.model['rounds']} were logged")
        return {
            **{name: sum(round[name] for round in rounds[1:]) for name in ("tokens", "seconds", "cpu_seconds")},
            "rounds": rounds,
            "cpu_seconds_of_command": sum(tree.cpu.values()),
            "peak_memory": tree.peak_memory,
        }

    def _fedsplit(self, clients: int, extra: Sequence[str]) -> dict[str, Any]:
        out = self.scratch / "run"
        # Older versions know no other type than float32.
        dtype = [] if self.dtype == "fp32" else ["--dtype", self.dtype]
        command = ["fedsplit.simulate", *self.flags(clients), *dtype, *extra, "--out", str(out)]
        measured = self._federation(command, out / "metrics.jsonl")
        summary = json.loads((out / "summary.json").read_text())
        sent = {name: n for name, n in summary["bytes"].items() if name.startswith(("activation", "gradient"))}
        tokens = sum(round["tokens"] for round in measured["rounds"])
        theory = 4 * tokens * self.model["width"] * {"fp32": 4, "bf16": 2}[self.dtype]
        return {
            **measured,
            "bytes": {**sent, "theory": theory, "ratio": sum(sent.values()) / theory},
            "summary": {name: summary[name] for name in ("tokens_per_second", "wall_seconds", "peak_memory")},
        }

    def _flower(self) -> dict[str, Any]:
        log = self.scratch / "log.jsonl"
        command = ["experiments.speed.flower_lora", "--log", str(log), "--dtype", self.dtype]
        return self._federation([*command, "--workers", str(CORES), "--", *self.flags(FLOWER_CLIENTS)], log)


@contextlib.contextmanager
def _worker(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    worker = subprocess.Popen(
        command, env=environment(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        yield worker
        worker.communicate(timeout=60)  # the end of its input ends it
    finally:
        worker.kill()
        worker.wait()


def _answer(worker: subprocess.Popen[str]) -> str:
    assert worker.stdout is not None and worker.stderr is not None
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError("\n".join(worker.stderr.read().splitlines()[-5:]))
    return line


def disturbed(before: Any, ours: float, seconds: float) -> float:
    """The share of the cores' time that went to others since `before`, or was withheld by the host."""

    def busy(times: Any) -> float:
        return float(sum(times) - times.idle - getattr(times, "iowait", 0) - getattr(times, "guest", 0))

    return max(0.0, busy(psutil.cpu_times()) - busy(before) - ours) / (seconds * CORES)


def wait_for_quiet(share: float, patience: float) -> None:
    """Waits until others leave the cores alone for three seconds, or patience is at its end."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        before, own = psutil.cpu_times(), time.process_time()
        time.sleep(3)
        if disturbed(before, time.process_time() - own, 3) <= share:
            return


def machine() -> dict[str, Any]:
    """What the numbers hold for; nothing that names the machine or a folder."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    packages = ("torch", "transformers", "peft", "flwr", "ray")
    commit = subprocess.run(
        ["git", "-C", str(HERE), "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    return {
        "cpu": names[0].partition(":")[2].strip() if names else platform.machine(),
        "cores": CORES,
        "memory": psutil.virtual_memory().total,
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}},
    }


def measure(model: Mapping[str, Any], dtype: str, folder: str, warmup: int, side: Sequence[str]) -> dict[str, Any]:
    """Measures a side once, and how much of the machine others had meanwhile."""
    before, own, started = psutil.cpu_times(), time.process_time(), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        measured = Bench(model, dtype, folder, warmup, Path(scratch)).measure(side)
    seconds = time.monotonic() - started
    ours = measured["cpu_seconds_of_command"] + time.process_time() - own
    return {**measured, "seconds_of_command": seconds, "others": disturbed(before, ours, seconds)}


def _line(record: Mapping[str, Any]) -> str:
    memory = ", ".join(f"{role} {peak / 1e6:.0f} MB" for role, peak in record["peak_memory"].items())
    return (
        f"{record['model']} {record['dtype']} {record['repeat']} {record['side']}: "
        f"{record['tokens'] / record['seconds']:,.1f} tokens/s, "
        f"{record['cpu_seconds'] / record['tokens'] * 1000:.3f} CPU s / 1,000 tokens, {memory}; "
        f"{record['seconds']:.1f} of {record['seconds_of_command']:.1f} s, others {record['others']:.0%}"
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "config.toml")
    parser.add_argument("--out", type=Path, default=HERE / "result.json")
    parser.add_argument("--cache", type=Path, default=Path("runs/speed-cache"), help="where random models are kept")
    parser.add_argument("--models", type=_names, help="of the configuration's; default: all")
    parser.add_argument("--dtypes", type=_names, default=["fp32", "bf16"])
    parser.add_argument("--sides", type=_names, default=list(SIDES))
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--steps", type=int, help="steps a round of all clients together, a multiple of 8")
    parser.add_argument("--rounds", type=int, help="at least 2")
    parser.add_argument("--extra", type=shlex.split, default=[], help="flags for all of fedsplit's sides")
    parser.add_argument("--quiet", type=float, default=0.1, help="share of the cores that others may use; see --wait")
    parser.add_argument("--wait", type=float, default=60, help="seconds to wait at most before each, until it is quiet")
    parser.add_argument("--redo", type=int, default=0, help="times to measure again what others disturbed")
    parser.add_argument("--keep", action="store_true", help="keep what --out holds of other models and types")
    args = parser.parse_args()
    config = tomllib.loads(args.config.read_text())
    overrides = {name: value for name in ("steps", "rounds") if (value := getattr(args, name))}
    models = {name: {**config["models"][name], **overrides} for name in args.models or config["models"]}
    for name, model in models.items():
        if model["steps"] % FLOWER_CLIENTS or model["rounds"] < 2:
            parser.error(f"{name}: steps must be a multiple of {FLOWER_CLIENTS}, rounds at least 2")

    records: list[dict[str, Any]] = []
    result = {"machine": machine(), "extra": args.extra, "models": models, "records": records}
    if args.keep and args.out.exists():
        old = json.loads(args.out.read_text())
        records += [r for r in old["records"] if r["model"] not in models or r["dtype"] not in args.dtypes]
        result["models"] = old["models"] | models
    failures = 0
    for name, model in models.items():
        folder = folder_of(model, args.cache)
        turns = itertools.product(args.dtypes, range(args.repeats or config["repeats"]), args.sides)
        for dtype, repeat, side in turns:
            label = {"model": name, "dtype": dtype, "side": side, "repeat": repeat, "steps": model["steps"]}
            words = [*shlex.split(side), *(args.extra if side.startswith("fedsplit") else [])]
            try:
                for _ in range(args.redo + 1):
                    wait_for_quiet(args.quiet, args.wait)
                    record = label | measure(model, dtype, folder, config["warmup"], words)
                    print(_line(record), flush=True)
                    if record["others"] <= args.quiet:
                        break
            except RuntimeError as error:
                failures += 1
                print(name, dtype, side, repeat, "failed:", error, file=sys.stderr, flush=True)
                continue
            records.append(record)
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
