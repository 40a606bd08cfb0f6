"""The run's folder: what is written, when, and so that a crash leaves nothing half-written."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import tomli_w
from torch import Tensor

from fedsplit.adaptation import adapting
from fedsplit.allowed import SettingError
from fedsplit.config import Config
from fedsplit.documents import as_document
from fedsplit.model.families import Family
from fedsplit.model.parts import Kind, ranges
from fedsplit.model.store import load_tensors, pack, sync, unpack, write_tensors
from fedsplit.updates import Adapters


def check_folder(path: Path) -> None:
    """Makes sure that a run's folder can be made, and leaves nothing behind.

    Raises:
        SettingError: The folder is there and not empty, or cannot be written.
    """
    nearest = path
    try:
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise SettingError("out", f"{path} (there already)", _FREE)
        nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    except OSError as error:
        raise SettingError("out", f"{path} ({error.strerror})", _FREE) from None
    try:  # only trying tells: permissions do not bind root, and a disk may be full or read-only
        os.rmdir(tempfile.mkdtemp(dir=nearest))
    except OSError as error:
        raise SettingError("out", f"{path} ({error.strerror} in {nearest})", _FREE) from None


def check_resumable(path: Path, rounds: int, patience: int = 0) -> None:
    """Makes sure that a run can go on.

    Raises:
        SettingError: There is no round in its folder, the last one is damaged, no round is left to do and what came of
            them is summed up, or the run has stopped because its patience ran out, and is given no more.
    """
    last = last_round(path)
    if last is None or not (path / "metrics.jsonl").exists():
        raise SettingError("resume", path, "the folder of a run that ended one round at least")
    try:
        facts = json.loads((last / _FACTS).read_text(encoding="utf-8"))
        done, waited = int(facts["round"]), int(facts.get("course", {}).get("waited", 0))
        load_tensors(last / _TENSORS)
    except Exception as error:  # noqa: BLE001  # safetensors raises an error of its own for a file cut short
        reason = f"{last.name} is damaged: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        words = f"a run whose last round is whole; remove {last} to go on from the round before"
        raise SettingError("resume", f"{path} ({reason})", words) from None
    if done > rounds or (done == rounds and _summed_up(path) == done):
        raise SettingError("rounds", rounds, f"more than {done}, the rounds that the run in {path} has done")
    if 0 < patience <= waited and _summed_up(path) == done:
        words = f"more than {waited}, the rounds in a row that did not better the held-out loss, or 0"
        raise SettingError("patience", patience, words)


def _summed_up(path: Path) -> int | None:
    """After which round a run was summed up; None where it was not."""
    try:
        return int(json.loads((path / "summary.json").read_text(encoding="utf-8"))["last_round"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _lock(path: Path) -> IO[bytes]:
    """Keeps other processes out of a run's folder until this one ends, however it ends: the system frees it.

    Raises:
        SettingError: Another one is at work in it.
    """
    file = open(path / "checkpoints" / ".lock", "wb")  # noqa: SIM115  # open for as long as the run lasts
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise SettingError("resume", str(path), "the folder of a run that is not at work any more") from None
        raise
    return file


def write_whole(target: Path, fill: Callable[[Path], None]) -> None:
    """Fills a folder beside its final place, makes it durable, and moves it there in one step."""
    draft = target.with_name(f".{target.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        fill(draft)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    for file in draft.rglob("*"):
        sync(file)
    sync(draft)
    shutil.rmtree(target, ignore_errors=True)  # of a run that went on, and ended before
    draft.rename(target)
    sync(target.parent)


@dataclass(frozen=True)
class Snapshot:
    """What a run needs to go on after a round.

    Attributes:
        round: The last round that is whole.
        facts: Plain values.
        groups: Tensors by group and name.
    """

    round: int
    facts: Mapping[str, Any]
    groups: Mapping[str, dict[str, Tensor]]


class RunFolder:
    """Everything a run leaves behind.

    `config.toml` runs again with `--config`; `data.json` says who holds what; `metrics.jsonl` has an object an event;
    `summary.json` the result; `adapter/` is one PEFT adapter of the unsplit model; `bottom_lora/`, `trunk_lora/`,
    `top_lora/` are the same by part; `checkpoints/round-NNNN/` is the adapter after each round, with what `--resume`
    needs; `clients/` is what clients keep on disks of their own; `personal/NNNN/` is a client's own adapter where it
    has one.

    Attributes:
        path: The folder.
        clients: The clients' disks.
        folds: Where the server remembers what was folded into base weights.
    """

    def __init__(self, path: Path, config: Config, family: Family, blocks: int) -> None:
        """Makes the folder, or opens that of a run that goes on, and writes the configuration.

        Args:
            path: Where.
            config: The run's.
            family: The model's family.
            blocks: Number of blocks of the model.

        Raises:
            SettingError: Another run has made the folder since it was checked, or is still at work in it.
        """
        self.path, self._config, self._family = path, config, family
        self._ranges = ranges(blocks, config.bounds)
        self._rounds = path / "checkpoints"
        self.clients, self.folds = path.absolute() / "clients", path / "checkpoints" / "folds"
        try:
            self._rounds.mkdir(parents=True, exist_ok=bool(config.resume))
        except FileExistsError:  # it was not there when it was checked: a run that began meanwhile has it
            raise SettingError("out", f"{path} (there already)", _FREE) from None
        self._lock = _lock(path)
        _replace(path / "config.toml", tomli_w.dumps(as_document(config)))

    def log(self, event: Mapping[str, Any]) -> None:
        """Appends an event to metrics.jsonl."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    def save_data(self, document: Mapping[str, Any]) -> None:
        """Writes who holds what."""
        _replace(self.path / "data.json", json.dumps(document, indent=2) + "\n")

    def snapshot(self) -> Snapshot | None:
        """Where a run that goes on was; None for one that begins. Events of later rounds are dropped."""
        last = last_round(self.path)
        if not self._config.resume or last is None:
            return None
        facts = json.loads((last / _FACTS).read_text(encoding="utf-8"))
        metrics = self.path / "metrics.jsonl"
        events = [line for line in metrics.read_text(encoding="utf-8").splitlines(keepends=True) if _is_whole(line)]
        _replace(metrics, "".join(line for line in events if json.loads(line)["round"] <= facts["round"]))
        return Snapshot(facts["round"], facts, unpack(load_tensors(last / _TENSORS)))

    def save_round(
        self, snapshot: Snapshot, adapters: Adapters, personal: Mapping[int, Adapters] | None = None
    ) -> None:
        """Writes the adapter of the whole model after a round, and what it takes to go on from there.

        Args:
            snapshot: What it takes.
            adapters: The adapter that all share.
            personal: Clients' own, where the round may be the one whose adapters a run leaves.
        """

        def fill(folder: Path) -> None:
            self._save(folder, adapters)
            for client, own in (personal or {}).items():
                self._save(folder / _PERSONAL / f"{client:04d}", own)
            write_tensors(folder / _TENSORS, pack(snapshot.groups))
            facts = {**snapshot.facts, "round": snapshot.round}
            (folder / _FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

        write_whole(self._rounds / f"round-{snapshot.round:04d}", fill)
        (self.path / "summary.json").unlink(missing_ok=True)  # of a run that ended, and goes on

    def read_round(self, round: int) -> tuple[Adapters, dict[int, Adapters]]:
        """The adapters that `save_round` wrote: the whole model's, and clients' own."""
        folder = self._rounds / f"round-{round:04d}"
        if self._config.prompt.kind != "off":  # adapter files have what the encoders make, and not the encoders
            groups = unpack(load_tensors(folder / _TENSORS))
            return Adapters({**groups.get("adapters", {}), **groups.get("trunk", {})}, {}), {}
        own = sorted((folder / _PERSONAL).glob("[0-9]*"))
        return adapting.load(folder), {int(one.name): adapting.load(one) for one in own}

    def read_facts(self, round: int) -> dict[str, Any]:
        """The plain values that `save_round` wrote."""
        text = (self._rounds / f"round-{round:04d}" / _FACTS).read_text(encoding="utf-8")
        facts: dict[str, Any] = json.loads(text)
        return facts

    def save_result(self, adapters: Adapters, summary: Mapping[str, Any]) -> None:
        """Writes the final adapter, whole and by part, and the summary last."""
        write_whole(self.path / "adapter", lambda folder: self._save(folder, adapters))
        for kind in self._ranges:
            write_whole(self.path / f"{kind}_lora", lambda folder, kind=kind: self._save(folder, adapters, kind))  # type: ignore[misc]
        _replace(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")

    def save_personal(self, client: int, adapters: Adapters) -> None:
        """Writes the adapter of the whole model as one client has it."""
        write_whole(self.path / _PERSONAL / f"{client:04d}", lambda folder: self._save(folder, adapters))

    def _save(self, folder: Path, whole: Adapters, kind: Kind | None = None) -> None:
        blocks = None if kind is None else self._ranges[kind]
        if kind is not None and blocks is not None:
            whole = adapting.of_part(whole, self._config, self._family, kind, blocks)
        adapting.save(folder, whole, self._config, self._family, kind, blocks)


_FACTS, _TENSORS, _PERSONAL = "state.json", "state.safetensors", "personal"

_FREE = "a folder that is not there yet or is empty, where files can be written"


def last_round(run: Path) -> Path | None:
    """The folder of the last round of a run that is whole; None where there is none."""
    rounds = (run / "checkpoints").glob("round-*")
    return max(rounds, key=lambda folder: int(folder.name.removeprefix("round-")), default=None)


def _replace(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text, encoding="utf-8")
    sync(draft)
    draft.rename(path)


def _is_whole(line: str) -> bool:
    """Whether a line of metrics.jsonl was written to its end."""
    try:
        return line.endswith("\n") and isinstance(json.loads(line), dict)
    except ValueError:
        return False
