"""The run's folder: what is written, when, and so that a crash leaves nothing half-written."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import tomli_w
from torch import Tensor

from fedsplit.adaptation import run_adapters
from fedsplit.durable import write_folder, write_text, writing
from fedsplit.errors import SettingError
from fedsplit.federation import manifest
from fedsplit.model.families import Family
from fedsplit.model.parts import Kind, ranges
from fedsplit.settings.config import Config
from fedsplit.settings.documents import as_document
from fedsplit.state.round_names import round_file, round_of
from fedsplit.tensor_files import load_tensors, pack, unpack, write_tensors
from fedsplit.updates import Adapters

INPUTS = "inputs"
"""Folder in a run's folder for the model and the data that were given as objects; written before the run begins."""


def check_folder(path: Path) -> None:
    """Makes sure that a run's folder can be made, and leaves nothing behind.

    Raises:
        SettingError: The folder is there and not empty, or cannot be written.
    """
    nearest = path
    try:
        if path.exists() and not (path.is_dir() and {entry.name for entry in path.iterdir()} <= {INPUTS}):
            raise SettingError("out", f"{path} (there already)", _FREE)
        nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    except OSError as error:
        raise SettingError("out", f"{path} ({error.strerror})", _FREE) from None
    try:  # only trying tells: permissions do not bind root, and a disk may be full or read-only
        os.rmdir(tempfile.mkdtemp(dir=nearest))
    except OSError as error:
        raise SettingError("out", f"{path} ({error.strerror} in {nearest})", _FREE) from None


def check_resumable(path: Path, config: Config) -> None:
    """Makes sure that a run can go on, from what it wrote itself and with the settings that it began with.

    Args:
        path: Its folder.
        config: The settings that it is to go on with.

    Raises:
        SettingError: There is no round in its folder, a file that it goes on from is not as it was written, a setting
            that decides the result has changed, no round is left to do and what came of them is summed up, or the run
            has stopped because its patience ran out, and is given no more.
    """
    last = last_round(path)
    if last is None or not (path / "metrics.jsonl").is_file():
        raise SettingError("resume", path, "the folder of a run that ended one round at least")
    written = _written(path, last)
    _check_elsewhere(path, written)
    facts = _facts_of(path, last)
    _check_metrics(path)
    manifest.check_settings(written, config, path)
    done, course = int(facts["round"]), facts.get("course", {})
    if config.keep_best and course.get("best", done) != done:  # what the run may leave in the end
        _written(path, _round_folder(path, int(course["best"])))
    if done > config.rounds or (done == config.rounds and _summed_up(path) == done):
        raise SettingError("rounds", config.rounds, f"more than {done}, the rounds that the run in {path} has done")
    waited = int(course.get("waited", 0))
    if 0 < config.patience <= waited and _summed_up(path) == done:
        words = f"more than {waited}, the rounds in a row that did not better the held-out loss, or 0"
        raise SettingError("patience", config.patience, words)


def check_content(path: Path, config: Config, content: manifest.Content) -> None:
    """Makes sure that a run that can go on has the data and the model that it began with.

    Raises:
        SettingError: It has not.
    """
    last = last_round(path)
    if last is not None:
        manifest.check_content(manifest.read(last), content, config, path)


def _written(path: Path, folder: Path) -> manifest.Manifest:
    """The manifest of a round's folder, all of whose files are as it says.

    Raises:
        SettingError: They are not.
    """
    number = round_of(folder)
    assert number is not None
    try:
        found = manifest.check_whole(folder, number)
    except manifest.Damaged as damaged:
        words = f"a run whose last round is whole; remove {folder} to go on from the round before"
        raise SettingError("resume", f"{path} ({folder.name} is damaged: {damaged})", words) from None
    return found


def _check_elsewhere(path: Path, written: manifest.Manifest) -> None:
    """Makes sure that the files outside the last round's folder, from which a run goes on, are as its manifest says.

    Raises:
        SettingError: They are not.
    """
    try:
        manifest.check_elsewhere(path, written)
    except manifest.Damaged as damaged:
        words = f"a run whose files are as they were at the end of round {written.round}"
        raise SettingError("resume", f"{path} ({damaged})", words) from None


def _facts_of(path: Path, last: Path) -> dict[str, Any]:
    """The plain values of the last round.

    Raises:
        SettingError: They cannot be read.
    """
    try:
        facts: dict[str, Any] = json.loads((last / _FACTS).read_text(encoding="utf-8"))
        int(facts["round"]), int(facts.get("course", {}).get("waited", 0))
        return facts
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{last.name} is damaged: {_FACTS}: {error}"
        words = f"a run whose last round is whole; remove {last} to go on from the round before"
        raise SettingError("resume", f"{path} ({reason})", words) from None


def _check_metrics(path: Path) -> None:
    """Makes sure that the events of a run can be read, but for a last line that was cut off as it was written.

    Raises:
        SettingError: A line is no event.
    """
    try:
        lines = (path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise SettingError("resume", f"{path} (metrics.jsonl: {error.strerror})", "a folder that can be read") from None
    for number, line in enumerate(lines, 1):
        if not _is_event(line) and (number < len(lines) or line.endswith(b"\n")):
            words = "a run whose events are JSON objects with a round, a line each"
            raise SettingError("resume", f"{path} (metrics.jsonl, line {number}, is damaged)", words)


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

    `config.toml` runs again with `--config`; `data.json` says who holds what; `adapter/` is one PEFT adapter of the
    unsplit model; `bottom_lora/`, `trunk_lora/`, `top_lora/` are the same by part; `metrics.jsonl` and `summary.json`
    are written by the sinks of `fedsplit.events.run_files`; `checkpoints/round-NNNN/` is the adapter after each round,
    with what `--resume` needs; `clients/` is what clients keep on disks of their own; `personal/NNNN/` is the adapter
    of a client that has one of its own.

    Attributes:
        path: The folder.
        clients: The clients' disks.
        folds: Where the server remembers what was folded into base weights.
    """

    def __init__(self, path: Path, config: Config, family: Family, blocks: int, content: manifest.Content) -> None:
        """Makes the folder, or opens that of a run that goes on, and writes the configuration.

        Args:
            path: Where.
            config: The run's.
            family: The model's family.
            blocks: Number of blocks of the model.
            content: The run's data and model, for the manifests.

        Raises:
            SettingError: Another run has made the folder since it was checked, or is still at work in it.
            NotWritten: It cannot be written.
        """
        self.path, self._config, self._family, self._content = path, config, family, content
        self._digests: dict[tuple[Path, int, int], str] = {}
        self._ranges = ranges(blocks, config.bounds)
        self._rounds = path / "checkpoints"
        self.clients, self.folds = path.absolute() / "clients", path / "checkpoints" / "folds"
        with writing(path):
            try:
                self._rounds.mkdir(parents=True, exist_ok=bool(config.resume))
            except FileExistsError:  # it was not there when it was checked: a run that began meanwhile has it
                raise SettingError("out", f"{path} (there already)", _FREE) from None
            self._lock = _lock(path)
        write_text(path / "config.toml", tomli_w.dumps(as_document(config)))

    def save_data(self, document: Mapping[str, Any]) -> None:
        """Writes who holds what."""
        write_text(self.path / "data.json", json.dumps(document, indent=2) + "\n")

    def snapshot(self) -> Snapshot | None:
        """Where a run that goes on was; None for one that begins. Events of later rounds are dropped."""
        last = last_round(self.path)
        if not self._config.resume or last is None:
            return None
        facts = json.loads((last / _FACTS).read_text(encoding="utf-8"))
        metrics = self.path / "metrics.jsonl"
        events = [line for line in metrics.read_bytes().splitlines(keepends=True) if _is_event(line)]
        kept = [line.decode() for line in events if json.loads(line)["round"] <= facts["round"]]
        write_text(metrics, "".join(kept))
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
            manifest.write(folder, snapshot.round, self._config, self._content, self._elsewhere(snapshot))

        write_folder(_round_folder(self.path, snapshot.round), fill)
        with writing(self.path):
            (self.path / "summary.json").unlink(missing_ok=True)  # of a run that ended, and goes on

    def _elsewhere(self, snapshot: Snapshot) -> dict[str, str]:
        """Digests of the files outside a round's folder from which a run goes on, by their path in the run's folder.

        They are what was folded into base weights, and what clients keep, as far as their disks lie here.
        """
        folds = [*self.folds.glob("round-*"), *(self.clients / "folds").glob("round-*")]
        files = [file for file in folds if (round_of(file) or snapshot.round + 1) <= snapshot.round]
        for client, accepted in snapshot.facts.get("accepted", {}).items():
            files.append(round_file(self.clients / f"{int(client):04d}", accepted))
        root = self.path.absolute()
        return {str(file.absolute().relative_to(root)): self._digest(file) for file in sorted(files) if file.exists()}

    def _digest(self, file: Path) -> str:
        """The digest of a file, which is read again only where it has changed: folds of all rounds are asked for."""
        state = file.stat()
        key = file, state.st_mtime_ns, state.st_size
        if key not in self._digests:
            self._digests[key] = manifest.digest(file)
        return self._digests[key]

    def read_round(self, round: int) -> tuple[Adapters, dict[int, Adapters]]:
        """The adapters that `save_round` wrote: the whole model's, and clients' own.

        Raises:
            Damaged: They are not as they were written.
        """
        folder = _round_folder(self.path, round)
        try:
            written = manifest.check_whole(folder, round)
        except manifest.Damaged as damaged:
            raise manifest.Damaged(f"{folder}, the best round, is damaged: {damaged}") from None
        if self._config.prompt.kind != "off":  # adapter files have what the encoders make, and not the encoders
            groups = unpack(load_tensors(folder / _TENSORS))
            return Adapters({**groups.get("adapters", {}), **groups.get("trunk", {})}, {}), {}
        clients = _personal_in(written)
        return run_adapters.load(folder), {int(name): run_adapters.load(folder / _PERSONAL / name) for name in clients}

    def read_facts(self, round: int) -> dict[str, Any]:
        """The plain values that `save_round` wrote."""
        text = (_round_folder(self.path, round) / _FACTS).read_text(encoding="utf-8")
        facts: dict[str, Any] = json.loads(text)
        return facts

    def save_result(self, adapters: Adapters) -> None:
        """Writes the final adapter, whole and by part."""
        write_folder(self.path / "adapter", lambda folder: self._save(folder, adapters))
        for kind in self._ranges:
            write_folder(self.path / f"{kind}_lora", lambda folder, kind=kind: self._save(folder, adapters, kind))  # type: ignore[misc]

    def save_personal(self, client: int, adapters: Adapters) -> None:
        """Writes the adapter of the whole model as one client has it."""
        write_folder(self.path / _PERSONAL / f"{client:04d}", lambda folder: self._save(folder, adapters))

    def _save(self, folder: Path, whole: Adapters, kind: Kind | None = None) -> None:
        blocks = None if kind is None else self._ranges[kind]
        if kind is not None and blocks is not None:
            whole = run_adapters.of_part(whole, self._config, self._family, kind, blocks)
        run_adapters.save(folder, whole, self._config, self._family, kind, blocks)


_FACTS, _TENSORS, _PERSONAL = "state.json", "state.safetensors", "personal"

_FREE = "a folder that is not there yet or is empty, where files can be written"


def last_round(run: Path) -> Path | None:
    """The folder of the last round of a run that is whole; None where there is none."""
    rounds = {number: folder for folder in (run / "checkpoints").glob("round-*") if (number := round_of(folder))}
    return rounds[max(rounds)] if rounds else None


def _personal_in(written: manifest.Manifest) -> list[str]:
    """Returns the names of the folders with clients' own adapters, by the manifest: others were put there later."""
    places = (Path(name).parts for name in written.files)
    return sorted({parts[1] for parts in places if parts[0] == _PERSONAL})


def _round_folder(run: Path, round: int) -> Path:
    return run / "checkpoints" / f"round-{round:04d}"


def _is_event(line: bytes) -> bool:
    """Whether a line of metrics.jsonl is an event that was written to its end."""
    try:
        event = json.loads(line)
        return line.endswith(b"\n") and isinstance(event, dict) and isinstance(event["round"], int)
    except (ValueError, KeyError):
        return False
