"""The run's folder. Every file is written in one step, so that a crash leaves no half-written file."""

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
from fedsplit.federation.model_card import CARD
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
"""Folder in a run's folder for a model and a data set from Python objects; written before the run begins."""


def check_folder(path: Path) -> None:
    """Checks that a run's folder can be made. The check leaves no file behind.

    Raises:
        SettingError: The folder exists and is not empty, or cannot be written.
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
    """Returns True if a folder is empty, but for the files that a run leaves which is killed in its first moment."""
    names = {entry.name for entry in path.iterdir()}
    visible = {name for name in names if not name.endswith(".draft")}
    return visible <= {INPUTS, CHECKPOINTS} and not checkpoints_of(path)


def _described(path: Path) -> str:
    """Describes the content of an existing folder, for messages."""
    if not ((path / "config.toml").is_file() and (path / CHECKPOINTS).is_dir()):
        return "there already"
    if checkpoints_of(path):
        return f"there already, with a run that --resume {path} goes on with"
    return f"there already, with a run stopped before its first checkpoint, which --resume {path} begins again"


@dataclass(frozen=True)
class Snapshot:
    """Values from which a run goes on after a round.

    Attributes:
        round: The last complete round.
        facts: Plain values.
        groups: Tensors by group and name.
    """

    round: int
    facts: Mapping[str, Any]
    groups: Mapping[str, dict[str, Tensor]]


@dataclass(frozen=True)
class _Kept:
    """Facts about a checkpoint in the run's folder.

    Attributes:
        loss: Held-out loss after the checkpoint's round, in nats; infinite if the loss is not finite or unknown.
        accepted: Last round, until the checkpoint, in which the server accepted an update; by client.
    """

    loss: float = math.inf
    accepted: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Unwritten:
    """Checkpoint of the best round, kept in memory while the disk cannot take the files."""

    snapshot: Snapshot
    adapters: Adapters
    personal: Mapping[int, Adapters]


class RunFolder:
    """The folder of a run.

    - `config.toml`: the settings; `--config` starts another run from this file.
    - `data.json`: a summary of the clients' data.
    - `adapter/`: the adapter of the unsplit model, for PEFT.
    - `bottom_lora/`, `trunk_lora/`, `top_lora/`: the same adapter, part by part.
    - `metrics.jsonl`, `summary.json`: written by the sinks of `fedsplit.events.run_files`.
    - `checkpoints/round-NNNN/`: the adapter after a round, with all further values for `--resume`.
    - `clients/`: the clients' disks.
    - `personal/NNNN/`: the model's adapter of a client with personal tensors.

    Attributes:
        path: The folder.
        content: Digests of data, model and code.
        clients: Folder of the clients' disks.
        folds: Folder of the changes of base weights.
        notes: Lines for the user about how the run goes on; empty for a new run.
    """

    def __init__(
        self,
        path: Path,
        config: Config,
        family: Family,
        blocks: int,
        content: manifest.Content,
    ) -> None:
        """Makes the folder of a new run, or opens the folder of a resumed run, and writes the configuration.

        Clients' text and unfinished files of a killed run are removed.

        Args:
            path: The folder.
            config: Configuration of the run.
            family: Family of the model.
            blocks: Number of blocks of the model.
            content: Digests of data, model and code, for the manifests.

        Raises:
            SettingError: Another run has made the folder since the check, or is still at work in the folder; or a
                resumed run has no valid checkpoint.
            NotWritten: The folder cannot be written.
        """
        self.path = path
        self._config = config
        self._family = family
        self.content = content
        self._digests: dict[tuple[Path, int, int], str] = {}  # by file, time of its last change, and size
        self._ranges = ranges(blocks, config.bounds)
        self.clients = path.absolute() / "clients"
        self.folds = path / CHECKPOINTS / FOLDS
        self.notes: list[str] = []
        self._resumed: Checkpoint | None = None
        self._kept: dict[int, _Kept] = {}
        self._unwritten: _Unwritten | None = None
        with writing(path):
            if not config.resume and (path / "config.toml").exists():
                # The folder was free when it was checked: another run began meanwhile.
                raise SettingError("out", f"{path} (there already)", _FREE)
            (path / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            self._lock = lock(path)  # held for as long as this object lives
        if config.resume:
            self._go_on()
        # After the search for a checkpoint, so that a resumed run that is refused leaves the earlier settings as they
        # are.
        write_text(path / "config.toml", tomli_w.dumps(as_document(config)))

    def _go_on(self) -> None:
        """Finds the checkpoint to go on from, and removes leftovers of a killed run."""
        with writing(self.path):
            # First, so that a checkpoint whose replacement was cut short has its name again when it is looked for.
            tidy(self.path)
            search = find_checkpoint(self.path, self._config.keep_best)
            self._resumed = search.newest
            self.notes += notes_on(search)
            if count := remove_left(self.clients):
                self.notes.append(f"removed the text of {count} clients, which a killed run had left in {self.clients}")
            if search.newest is None:  # files of an unfinished first round must not be taken for a state
                shutil.rmtree(self.clients, ignore_errors=True)
                shutil.rmtree(self.folds, ignore_errors=True)
                (self.path / "metrics.jsonl").unlink(missing_ok=True)
        for number, folder in checkpoints_of(self.path).items():
            if self._resumed is not None and number <= self._resumed.round:
                self._kept[number] = _kept_in(folder)

    def save_data(self, document: Mapping[str, Any]) -> None:
        """Writes the summary of the clients' data."""
        write_text(self.path / "data.json", json.dumps(document, indent=2) + "\n")

    def snapshot(self) -> Snapshot | None:
        """Returns the checkpoint of a resumed run, and removes the events of later rounds; None for a new run."""
        if self._resumed is None:
            return None
        facts = self._resumed.facts
        folder = self._resumed.folder
        metrics = self.path / "metrics.jsonl"
        # Without a line that a kill has cut off.
        events = [line for line in metrics.read_bytes().splitlines(keepends=True) if is_event(line)]
        last = facts["round"]
        kept = [line.decode() for line in events if json.loads(line)["round"] <= last]
        write_text(metrics, "".join(kept))
        return Snapshot(facts["round"], facts, unpack(load_tensors(folder / _TENSORS)))

    def is_due(self, round: int, is_last: bool, is_best: bool) -> bool:
        """Returns True if a round gets a checkpoint.

        Args:
            round: The round.
            is_last: The run ends with the round.
            is_best: The round is the best so far.
        """
        config = self._config
        return round % config.checkpoint.every == 0 or is_last or (config.keep_best and is_best)

    def rounds_needed(self, client: int) -> tuple[int, ...]:
        """Returns the rounds whose state a client must keep, since a checkpoint goes back to them."""
        accepted = [kept.accepted for kept in self._kept.values()]
        if self._unwritten is not None:
            accepted.append(_kept_of(self._unwritten.snapshot.facts).accepted)
        # Without 0, which stands for no accepted update, and so for no state.
        return tuple(sorted({rounds[client] for rounds in accepted if client in rounds} - {0}))

    def save_round(
        self, snapshot: Snapshot, adapters: Adapters, personal: Mapping[int, Adapters] | None = None
    ) -> None:
        """Writes a checkpoint, and then removes old checkpoints by the settings.

        Args:
            snapshot: Values from which the run can go on after the round.
            adapters: Shared adapter of the whole model.
            personal: Adapters by client, for clients with personal tensors. Only needed for a round that may become
                the result of the run.

        Raises:
            NotWritten: The checkpoint could not be written; earlier checkpoints are unchanged. Under `keep_best` the
                best round stays in memory, and is written before the next checkpoint.
        """
        this = _Unwritten(snapshot, adapters, personal or {})
        best = snapshot.facts.get("course", {}).get("best")
        # The best round comes first: under `keep_best` no run can go on from this checkpoint without that of the best
        # round.
        if self._unwritten is not None and self._unwritten.snapshot.round == best != snapshot.round:
            self._write(self._unwritten)
        # Before the write, so that a round that the disk does not take is still in memory.
        self._unwritten = this if self._config.keep_best and best == snapshot.round else None
        self._write(this)
        self._unwritten = None
        with writing(self.path):
            (self.path / "summary.json").unlink(missing_ok=True)  # of a run that ended, and goes on
        self._prune(snapshot.round, best)

    def _write(self, checkpoint: _Unwritten) -> None:
        """Writes a checkpoint in one step: the folder gets its name once all files are on the disk.

        Raises:
            NotWritten: The checkpoint could not be written.
        """
        snapshot = checkpoint.snapshot

        def fill(folder: Path) -> None:
            self._save(folder, checkpoint.adapters)
            for client, own in checkpoint.personal.items():
                self._save(folder / _PERSONAL / f"{client:04d}", own)
            write_tensors(folder / _TENSORS, pack(snapshot.groups))
            facts = {**snapshot.facts, "round": snapshot.round}
            (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            # Last, since the manifest has the digests of all other files.
            manifest.write(folder, snapshot.round, self._config, self.content, self._elsewhere(snapshot))

        metrics = self.path / "metrics.jsonl"
        with writing(metrics):
            if metrics.exists():  # after a power cut, the checkpoint must not be there without its events
                sync(metrics)
        write_folder(checkpoint_folder(self.path, snapshot.round), fill)
        self._kept[snapshot.round] = _kept_of(snapshot.facts)

    def _prune(self, newest: int, best: int | None) -> None:
        """Removes superfluous checkpoints, and checkpoints of later rounds, which a resumed run plays again.

        Args:
            newest: Round of the newest checkpoint.
            best: The best round so far; None if unknown.

        Raises:
            NotWritten: A checkpoint could not be removed.
        """
        folders = checkpoints_of(self.path)
        done = [number for number in folders if number <= newest]
        keep = self._config.checkpoint.keep
        newest_ones = done[-keep:] if keep else done  # 0 keeps all
        wanted = {*newest_ones, best}

        def loss_and_number(number: int) -> tuple[float, int]:
            return self._kept.get(number, _Kept()).loss, number

        wanted.add(min(done, key=loss_and_number))  # the lowest loss stays in any case, see `--keep-checkpoints`
        for number, folder in folders.items():
            if number not in wanted:
                self._kept.pop(number, None)
                remove_folder(folder)

    def _elsewhere(self, snapshot: Snapshot) -> dict[str, str]:
        """Returns digests of the files outside a checkpoint's folder that the run needs to go on.

        The files are the changes of base weights, and the state of clients whose disks are on this machine. Digests are
        by the file's path in the run's folder.
        """
        of_server = self.folds.glob("round-*")
        of_clients = (self.clients / FOLDS).glob("round-*")
        folds = [*of_server, *of_clients]
        # A file with any other name counts as one of a later round, and is left out.
        files = [file for file in folds if (round_of(file) or snapshot.round + 1) <= snapshot.round]
        for client, accepted in snapshot.facts.get("accepted", {}).items():
            files.append(round_file(self.clients / f"{int(client):04d}", accepted))
        root = self.path.absolute()
        known = self._digests
        self._digests = {}  # without digests of files that no later round needs
        found = {}
        for file in sorted(files):
            # Clients on other machines have no file here.
            if file.exists():
                found[str(file.absolute().relative_to(root))] = self._digest(file, known)
        return found

    def _digest(self, file: Path, known: Mapping[tuple[Path, int, int], str]) -> str:
        """Returns the digest of a file. An unchanged file is not read again, since folds of all rounds are needed."""
        state = file.stat()
        key = file, state.st_mtime_ns, state.st_size
        self._digests[key] = known[key] if key in known else manifest.digest(file)
        return self._digests[key]

    def read_round(self, round: int) -> tuple[Adapters, dict[int, Adapters]]:
        """Reads the adapters of a checkpoint: the shared adapter of the whole model, and adapters by client.

        Raises:
            Damaged: A file of the checkpoint has changed.
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
            tensors = {**groups.get("adapters", {}), **groups.get("trunk", {})}
            return Adapters(tensors, {}), {}
        personal = {}
        for name in _personal_in(written):
            personal[int(name)] = run_adapters.load(folder / _PERSONAL / name)
        return run_adapters.load(folder), personal

    def read_facts(self, round: int) -> dict[str, Any]:
        """Reads the plain values of a checkpoint."""
        if self._unwritten is not None and self._unwritten.snapshot.round == round:
            return dict(self._unwritten.snapshot.facts)
        text = (checkpoint_folder(self.path, round) / FACTS).read_text(encoding="utf-8")
        facts: dict[str, Any] = json.loads(text)
        return facts

    def save_result(self, adapters: Adapters, card: str = "") -> None:
        """Writes the final adapter, whole and by part.

        Args:
            adapters: Adapter of the unsplit model.
            card: The model card, which lies beside the whole adapter; empty for none.
        """

        def fill(folder: Path) -> None:
            self._save(folder, adapters)
            if card:
                (folder / CARD).write_text(card, encoding="utf-8")

        write_folder(self.path / "adapter", fill)
        for kind in self._ranges:
            write_folder(self.path / f"{kind}_lora", lambda folder, kind=kind: self._save(folder, adapters, kind))  # type: ignore[misc]

    def save_personal(self, client: int, adapters: Adapters) -> None:
        """Writes the whole model's adapter of one client."""
        write_folder(self.path / _PERSONAL / f"{client:04d}", lambda folder: self._save(folder, adapters))

    def _save(self, folder: Path, whole: Adapters, kind: Kind | None = None) -> None:
        blocks = None if kind is None else self._ranges[kind]
        if kind is not None and blocks is not None:
            whole = run_adapters.of_part(whole, self._config, self._family, kind, blocks)
        run_adapters.save(folder, whole, self._config, self._family, kind, blocks)


_TENSORS = "state.safetensors"
_PERSONAL = "personal"

_FREE = "a folder that is not there yet or is empty, where files can be written"


def _personal_in(written: manifest.Manifest) -> list[str]:
    """Returns the names of the folders with clients' adapters. Folders that the manifest lacks were added later."""
    places = (Path(name).parts for name in written.files)
    return sorted({parts[1] for parts in places if parts[0] == _PERSONAL})


def _kept_in(folder: Path) -> _Kept:
    """Reads facts about a checkpoint that may be damaged."""
    try:
        return _kept_of(json.loads((folder / FACTS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError):
        return _Kept()


def _kept_of(facts: Mapping[str, Any]) -> _Kept:
    loss = float(facts.get("after", math.inf))
    by_client = facts.get("accepted", {})
    accepted = {int(client): int(round) for client, round in by_client.items()}
    return _Kept(loss if math.isfinite(loss) else math.inf, accepted)
