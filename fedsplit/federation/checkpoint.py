"""The run's folder: what is written, when, and so that a crash leaves nothing half-written."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w
from torch import Tensor

from fedsplit.adaptation import run_adapters
from fedsplit.corpora.shards import remove_left
from fedsplit.durable import remove_folder, sync, tidy, write_folder, write_text, writing
from fedsplit.errors import SettingError
from fedsplit.federation import manifest
from fedsplit.federation.resumption import (
    CHECKPOINTS,
    FACTS,
    Checkpoint,
    checkpoint_folder,
    checkpoints_of,
    find_checkpoint,
    is_event,
    notes_on,
)
from fedsplit.model.families import Family
from fedsplit.model.parts import Kind, ranges
from fedsplit.settings.config import Config
from fedsplit.settings.documents import as_document
from fedsplit.state.fold_log import FOLDS
from fedsplit.state.round_names import round_file, round_of
from fedsplit.state.run_lock import lock
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
        is_dangling = path.is_symlink() and not path.exists()
        if is_dangling or (path.exists() and not (path.is_dir() and _is_free(path))):
            raise SettingError("out", f"{path} ({_described(path)})", _FREE)
        nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    except OSError as error:
        raise SettingError("out", f"{path} ({error.strerror})", _FREE) from None
    try:  # only trying tells: permissions do not bind root, and a disk may be full or read-only
        os.rmdir(tempfile.mkdtemp(dir=nearest))
    except OSError as error:
        raise SettingError("out", f"{path} ({error.strerror} in {nearest})", _FREE) from None


def _is_free(path: Path) -> bool:
    """Tells whether a folder has nothing of a run but what a kill in the run's first moment leaves."""
    names = {entry.name for entry in path.iterdir()}
    visible = {name for name in names if not name.endswith(".draft")}
    return visible <= {INPUTS, CHECKPOINTS} and not checkpoints_of(path)


def _described(path: Path) -> str:
    """Returns what a folder holds that is there already."""
    if not ((path / "config.toml").is_file() and (path / CHECKPOINTS).is_dir()):
        return "there already"
    if checkpoints_of(path):
        return f"there already, with a run that --resume {path} goes on with"
    return f"there already, with a run stopped before its first checkpoint, which --resume {path} begins again"


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


@dataclass(frozen=True)
class _Kept:
    """What is known of a checkpoint in the run's folder.

    Attributes:
        loss: Held-out loss after its round, in nats; infinite where it is not finite or not known.
        accepted: By client, the last round until then of which the server accepted the client's update.
    """

    loss: float = math.inf
    accepted: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Unwritten:
    """The checkpoint of the best round, as long as it could not be written."""

    snapshot: Snapshot
    adapters: Adapters
    personal: Mapping[int, Adapters]


class RunFolder:
    """Everything a run leaves behind.

    `config.toml` runs again with `--config`; `data.json` says who holds what; `adapter/` is one PEFT adapter of the
    unsplit model; `bottom_lora/`, `trunk_lora/`, `top_lora/` are the same by part; `metrics.jsonl` and `summary.json`
    are written by the sinks of `fedsplit.events.run_files`; `checkpoints/round-NNNN/` is the adapter after a round,
    with what `--resume` needs; `clients/` is what clients keep on disks of their own; `personal/NNNN/` is the adapter
    of a client that has one of its own.

    Attributes:
        path: The folder.
        clients: The clients' disks.
        folds: Where the server remembers what was folded into base weights.
        notes: Lines for the user about how the run goes on; empty for a new run.
    """

    def __init__(self, path: Path, config: Config, family: Family, blocks: int, content: manifest.Content) -> None:
        """Makes the folder, or opens that of a run that goes on, and writes the configuration.

        Text of clients and drafts that a killed run has left in the folder are removed.

        Args:
            path: Where.
            config: The run's.
            family: The model's family.
            blocks: Number of blocks of the model.
            content: The run's data and model, for the manifests.

        Raises:
            SettingError: Another run has made the folder since it was checked, or is still at work in it, or none of
                its checkpoints is valid.
            NotWritten: It cannot be written.
        """
        self.path, self._config, self._family, self._content = path, config, family, content
        self._digests: dict[tuple[Path, int, int], str] = {}
        self._ranges = ranges(blocks, config.bounds)
        self.clients, self.folds = path.absolute() / "clients", path / CHECKPOINTS / FOLDS
        self.notes: list[str] = []
        self._resumed: Checkpoint | None = None
        self._kept: dict[int, _Kept] = {}
        self._unwritten: _Unwritten | None = None
        with writing(path):
            if not config.resume and (path / "config.toml").exists():
                # It was not there when it was checked: a run that began meanwhile has it.
                raise SettingError("out", f"{path} (there already)", _FREE)
            (path / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            self._lock = lock(path)
        if config.resume:
            self._go_on()
        write_text(path / "config.toml", tomli_w.dumps(as_document(config)))

    def _go_on(self) -> None:
        """Finds the checkpoint to go on from, and removes what a killed run has left."""
        with writing(self.path):
            tidy(self.path)
            search = find_checkpoint(self.path, self._config.keep_best)
            self._resumed = search.newest
            self.notes += notes_on(search)
            if count := remove_left(self.clients):
                self.notes.append(f"removed the text of {count} clients, which a killed run had left in {self.clients}")
            if search.newest is None:  # nothing of a first round that was not finished may be taken for a state
                shutil.rmtree(self.clients, ignore_errors=True)
                shutil.rmtree(self.folds, ignore_errors=True)
                (self.path / "metrics.jsonl").unlink(missing_ok=True)
        for number, folder in checkpoints_of(self.path).items():
            if self._resumed is not None and number <= self._resumed.round:
                self._kept[number] = _kept_in(folder)

    def save_data(self, document: Mapping[str, Any]) -> None:
        """Writes who holds what."""
        write_text(self.path / "data.json", json.dumps(document, indent=2) + "\n")

    def snapshot(self) -> Snapshot | None:
        """Where a run that goes on was; None for one that begins. Events of later rounds are dropped."""
        if self._resumed is None:
            return None
        facts, folder = self._resumed.facts, self._resumed.folder
        metrics = self.path / "metrics.jsonl"
        events = [line for line in metrics.read_bytes().splitlines(keepends=True) if is_event(line)]
        kept = [line.decode() for line in events if json.loads(line)["round"] <= facts["round"]]
        write_text(metrics, "".join(kept))
        return Snapshot(facts["round"], facts, unpack(load_tensors(folder / _TENSORS)))

    def is_due(self, round: int, is_last: bool, is_best: bool) -> bool:
        """Tells whether a round gets a checkpoint.

        Args:
            round: The round.
            is_last: The run ends with the round.
            is_best: The round is the best so far.
        """
        config = self._config
        return round % config.checkpoint.every == 0 or is_last or (config.keep_best and is_best)

    def rounds_needed(self, client: int) -> tuple[int, ...]:
        """Returns the rounds of a client's own state that the kept checkpoints go back to."""
        accepted = [kept.accepted for kept in self._kept.values()]
        if self._unwritten is not None:
            accepted.append(_kept_of(self._unwritten.snapshot.facts).accepted)
        return tuple(sorted({rounds[client] for rounds in accepted if client in rounds} - {0}))

    def save_round(
        self, snapshot: Snapshot, adapters: Adapters, personal: Mapping[int, Adapters] | None = None
    ) -> None:
        """Writes a checkpoint, and then removes those that are no longer to be kept.

        Args:
            snapshot: What it takes to go on from the round.
            adapters: The adapter that all share.
            personal: Clients' own, where the round may be the one whose adapters a run leaves.

        Raises:
            NotWritten: The checkpoint could not be written; the earlier ones are as they were. The best round of a run
                with `keep_best` stays in memory, and is written before the next checkpoint.
        """
        this = _Unwritten(snapshot, adapters, personal or {})
        best = snapshot.facts.get("course", {}).get("best")
        if self._unwritten is not None and self._unwritten.snapshot.round == best != snapshot.round:
            self._write(self._unwritten)
        self._unwritten = this if self._config.keep_best and best == snapshot.round else None
        self._write(this)
        self._unwritten = None
        with writing(self.path):
            (self.path / "summary.json").unlink(missing_ok=True)  # of a run that ended, and goes on
        self._prune(snapshot.round, best)

    def _write(self, checkpoint: _Unwritten) -> None:
        """Writes a checkpoint in one step: its folder appears when all its files, the manifest last, are on the disk.

        Raises:
            NotWritten: It could not be written.
        """
        snapshot = checkpoint.snapshot

        def fill(folder: Path) -> None:
            self._save(folder, checkpoint.adapters)
            for client, own in checkpoint.personal.items():
                self._save(folder / _PERSONAL / f"{client:04d}", own)
            write_tensors(folder / _TENSORS, pack(snapshot.groups))
            facts = {**snapshot.facts, "round": snapshot.round}
            (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            manifest.write(folder, snapshot.round, self._config, self._content, self._elsewhere(snapshot))

        metrics = self.path / "metrics.jsonl"
        with writing(metrics):
            if metrics.exists():  # the events until this round must not be younger than its checkpoint
                sync(metrics)
        write_folder(checkpoint_folder(self.path, snapshot.round), fill)
        self._kept[snapshot.round] = _kept_of(snapshot.facts)

    def _prune(self, newest: int, best: int | None) -> None:
        """Removes the checkpoints that are not to be kept, and those of rounds that the run has not come to again.

        Args:
            newest: Round of the checkpoint that has just been written.
            best: The best round so far; None where it is not known.

        Raises:
            NotWritten: A checkpoint could not be removed.
        """
        folders = checkpoints_of(self.path)
        done = [number for number in folders if number <= newest]
        keep = self._config.checkpoint.keep
        wanted = {*(done[-keep:] if keep else done), best}
        wanted.add(min(done, key=lambda number: (self._kept.get(number, _Kept()).loss, number)))
        for number, folder in folders.items():
            if number not in wanted:
                self._kept.pop(number, None)
                remove_folder(folder)

    def _elsewhere(self, snapshot: Snapshot) -> dict[str, str]:
        """Digests of the files outside a round's folder from which a run goes on, by their path in the run's folder.

        They are what was folded into base weights, and what clients keep, as far as their disks lie here.
        """
        folds = [*self.folds.glob("round-*"), *(self.clients / FOLDS).glob("round-*")]
        files = [file for file in folds if (round_of(file) or snapshot.round + 1) <= snapshot.round]
        for client, accepted in snapshot.facts.get("accepted", {}).items():
            files.append(round_file(self.clients / f"{int(client):04d}", accepted))
        root = self.path.absolute()
        known, self._digests = self._digests, {}  # digests of files that are needed no more are forgotten
        found = {}
        for file in sorted(files):
            if file.exists():
                found[str(file.absolute().relative_to(root))] = self._digest(file, known)
        return found

    def _digest(self, file: Path, known: Mapping[tuple[Path, int, int], str]) -> str:
        """The digest of a file, which is read again only where it has changed: folds of all rounds are asked for."""
        state = file.stat()
        key = file, state.st_mtime_ns, state.st_size
        self._digests[key] = known[key] if key in known else manifest.digest(file)
        return self._digests[key]

    def read_round(self, round: int) -> tuple[Adapters, dict[int, Adapters]]:
        """The adapters that `save_round` wrote: the whole model's, and clients' own.

        Raises:
            Damaged: They are not as they were written.
        """
        if self._unwritten is not None and self._unwritten.snapshot.round == round:
            return self._unwritten.adapters, dict(self._unwritten.personal)
        folder = checkpoint_folder(self.path, round)
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
        if self._unwritten is not None and self._unwritten.snapshot.round == round:
            return dict(self._unwritten.snapshot.facts)
        text = (checkpoint_folder(self.path, round) / FACTS).read_text(encoding="utf-8")
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


_TENSORS, _PERSONAL = "state.safetensors", "personal"

_FREE = "a folder that is not there yet or is empty, where files can be written"


def _personal_in(written: manifest.Manifest) -> list[str]:
    """Returns the names of the folders with clients' own adapters, by the manifest: others were put there later."""
    places = (Path(name).parts for name in written.files)
    return sorted({parts[1] for parts in places if parts[0] == _PERSONAL})


def _kept_in(folder: Path) -> _Kept:
    """Reads what is known of a checkpoint, of which nobody has checked whether it is valid."""
    try:
        return _kept_of(json.loads((folder / FACTS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError):
        return _Kept()


def _kept_of(facts: Mapping[str, Any]) -> _Kept:
    loss = float(facts.get("after", math.inf))
    accepted = {int(client): int(round) for client, round in facts.get("accepted", {}).items()}
    return _Kept(loss if math.isfinite(loss) else math.inf, accepted)
