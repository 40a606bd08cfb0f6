"""Do checkpoints survive kill -9 and a full disk? Kills a process that writes them, and fills a small tmpfs.

$ python -m experiments.reliability.checkpoints --kills 60            # writes checkpoints.json beside this file

The tmpfs needs the right to mount, which `unshare --user --map-root-user --mount` gives on most machines.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

import torch

from fedsplit.durable import NotWritten, tidy
from fedsplit.federation.checkpoint import RunFolder, Snapshot
from fedsplit.federation.manifest import Content, Damaged, check_whole
from fedsplit.federation.resumption import checkpoints_of, newest_checkpoint
from fedsplit.model.facts import read_facts
from fedsplit.model.sources import config_folder
from fedsplit.settings.config import Config
from fedsplit.settings.sections import CheckpointSettings
from fedsplit.tensor_files import load_tensors
from fedsplit.updates import Adapters, Layer

RESULT = Path(__file__).with_suffix(".json")

ROOT = Path(__file__).parents[2]

LAYER = "transformer.h.0.attn.c_attn"

KEEP = 2


def open_folder(out: Path) -> RunFolder:
    """Opens a run's folder, new or again, for the bundled model."""
    resume = str(out) if (out / "config.toml").exists() else ""
    config = Config(checkpoint=CheckpointSettings(keep=KEEP), resume=resume)
    facts = read_facts(config_folder(config.model))
    return RunFolder(out, config, facts.family, facts.blocks, Content("data", {}))


def adapters_of(round: int, width: int) -> Adapters:
    """Returns adapters whose every value is the round's number."""
    a = torch.full((8, width), float(round))
    b = torch.full((3 * width, 8), float(round))
    return Adapters({f"{LAYER}.lora_A.weight": a, f"{LAYER}.lora_B.weight": b}, {LAYER: Layer(2.0, transposed=True)})


def write_round(folder: RunFolder, round: int, width: int) -> None:
    """Writes a checkpoint whose tensors tell its round; the best round is the third."""
    groups = {"adapters": {"x": torch.full((width, width), float(round))}}
    facts = {"after": abs(round - 3.0), "course": {"best": min(round, 3), "waited": 0}}
    folder.save_round(Snapshot(round, facts, groups), adapters_of(round, width))


def write_for_ever(out: Path, width: int, told: int) -> NoReturn:
    """Writes one checkpoint after another, and a line when each is there, until somebody kills the process.

    Args:
        out: The run's folder.
        width: Width of the tensors.
        told: Descriptor that gets the lines.
    """
    folder = open_folder(out)
    round = max(checkpoints_of(out), default=0)
    while True:
        round += 1
        write_round(folder, round, width)
        os.write(told, f"{round}\n".encode())


def torn(out: Path) -> list[str]:
    """Returns what is wrong in a run's folder after a kill; empty where all is well."""
    wrong = []
    for round, folder in checkpoints_of(out).items():
        try:
            check_whole(folder, round)
        except Damaged as damaged:
            wrong.append(f"{folder.name} is damaged: {damaged}")
            continue
        values = load_tensors(folder / "state.safetensors")["adapters/x"]
        if not bool((values == round).all()):
            wrong.append(f"{folder.name} holds values of another round")
    if newest_checkpoint(out, keep_best=False).newest is None:
        wrong.append("no valid checkpoint")
    return wrong


def kill_repeatedly(kills: int, seed: int = 0, width: int = 256) -> dict[str, Any]:
    """Kills the writing process again and again, at random moments, and looks at what it left each time.

    This process is forked, so that torch must compute in one thread.

    Args:
        kills: Number of kills.
        seed: Seed of the moments.
        width: Width of the tensors; a checkpoint has about 4 * width * (width + 64) bytes.

    Returns:
        Number of kills, of those that left a draft (in the middle of a checkpoint), and of those after which the newest
        checkpoint was older than the last one that was told; what was torn; the last round; the most checkpoints that
        there were at once; and the drafts that are left after a clean-up.
    """
    moments = random.Random(seed)
    found: dict[str, Any] = {"kills": kills, "in_the_middle": 0, "torn": [], "lost": 0, "checkpoints": 0}
    found["most_kept"] = 0
    with tempfile.TemporaryDirectory() as parent:
        out = Path(parent) / "run"
        for _ in range(kills):
            told = _kill_one(out, width, moments.uniform(0.0, 0.15))
            found["in_the_middle"] += any(out.rglob(".*.draft"))
            found["torn"] += torn(out)
            newest = newest_checkpoint(out, keep_best=False).newest
            found["lost"] += newest is None or newest.round < told
            found["checkpoints"] = told
            found["most_kept"] = max(found["most_kept"], len(checkpoints_of(out)))
        tidy(out)
        found["drafts_left"] = len([*out.rglob(".*.draft")])
    return found


def _kill_one(out: Path, width: int, seconds: float) -> int:
    """Starts a process that writes checkpoints, and kills it some time after its first one.

    Returns:
        The last round whose checkpoint was there before the kill, as the process told.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            write_for_ever(out, width, writing)
        finally:
            os._exit(1)
    os.close(writing)
    with open(reading, encoding="utf-8") as lines:
        told = int(lines.readline())
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return max([told, *map(int, lines)])


def fill_disk(out: Path, rounds: int = 20, width: int = 256) -> dict[str, Any]:
    """Writes checkpoints on a small disk that another file fills up from the fifth round to the tenth.

    Args:
        out: The run's folder, on the small disk.
        rounds: Number of rounds.
        width: Width of the tensors.
    """
    folder = open_folder(out)
    filler = out.parent / "filler"
    found: dict[str, Any] = {"rounds": rounds, "failed": [], "torn": [], "reasons": {}}
    for round in range(1, rounds + 1):
        if round == 5:
            _fill(filler)
        if round == 11:
            filler.unlink()
        try:
            write_round(folder, round, width)
        except NotWritten as error:
            found["failed"].append(round)
            reason = str(error).partition("(")[2].partition(")")[0]
            found["reasons"][reason] = found["reasons"].get(reason, 0) + 1
        found["torn"] += torn(out)
    found["kept"] = [*checkpoints_of(out)]
    found["bytes"] = shutil.disk_usage(out).total
    return found


def _fill(path: Path) -> None:
    """Writes a file until the disk is full."""
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 4096)
        except OSError:
            return


def on_small_disk(size: str = "6m") -> dict[str, Any]:
    """Mounts a tmpfs in a namespace of its own, and fills it there.

    Returns:
        What `fill_disk` found; the reason where nothing can be mounted.
    """
    with tempfile.TemporaryDirectory() as mount:
        inner = f"{sys.executable} -m experiments.reliability.checkpoints --fill {mount}/run"
        script = f"mount -t tmpfs -o size={size} tmpfs {mount} && {inner}"
        call = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
        done = subprocess.run(call, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        return {"skipped": " ".join(done.stderr.split())}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--fill", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.fill:
        print(json.dumps(fill_disk(flags.fill)))
    else:
        torch.set_num_threads(1)  # a process with threads cannot be forked
        result = {"kill -9": kill_repeatedly(flags.kills, width=flags.width), "tmpfs": on_small_disk()}
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
