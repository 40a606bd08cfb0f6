"""Resuming a run: search for the newest valid checkpoint, and checks that settings, data and model fit."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsplit.errors import SettingError, first_line
from fedsplit.events.versions import versions
from fedsplit.federation import manifest
from fedsplit.federation.manifest import Damaged, Manifest
from fedsplit.settings.config import Config
from fedsplit.state.round_names import round_of

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints in a run's folder."""

FACTS = "state.json"
"""File with the plain values of a checkpoint."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint with all files unchanged.

    Attributes:
        folder: Folder of the checkpoint.
        manifest: Manifest of the checkpoint.
        facts: Plain values of the checkpoint.
    """

    folder: Path
    manifest: Manifest
    facts: Mapping[str, Any]

    @property
    def round(self) -> int:
        """Round of the checkpoint."""
        return self.manifest.round


@dataclass(frozen=True)
class Search:
    """Outcome of the search for a checkpoint.

    Attributes:
        newest: The newest valid checkpoint; None if there is none.
        skipped: A line for each newer, invalid checkpoint, with name and reason.
    """

    newest: Checkpoint | None
    skipped: tuple[str, ...] = ()


def checkpoints_of(run: Path) -> dict[int, Path]:
    """Returns the folders of a run's checkpoints, valid or not, by round and in the order of the rounds.

    Example:
        >>> checkpoints_of(Path("nowhere"))
        {}
    """
    folders = {}
    for folder in (run / CHECKPOINTS).glob("round-*"):
        number = round_of(folder)
        if number:  # the name of another folder may begin alike
            folders[number] = folder
    return dict(sorted(folders.items()))


def how_to_go_on(run: Path | None, only_from_checkpoint: bool = False) -> str:
    """Returns a line with the last checkpoint of a stopped run, and with the command that resumes the run.

    Args:
        run: Folder of the run, which need not exist; None for a run without a folder.
        only_from_checkpoint: True for an empty result if the run has no checkpoint.

    Example:
        >>> how_to_go_on(Path("nowhere"))
        'nothing is saved yet'
    """
    if only_from_checkpoint and (run is None or not checkpoints_of(run)):
        return ""
    if run is None or not (run / "config.toml").is_file():
        return "nothing is saved yet"
    command = f"python -m fedsplit.simulate --resume {shlex.quote(str(run))}"
    checkpoints = checkpoints_of(run)
    if not checkpoints:
        return f"nothing is saved yet: {command} begins again"
    last = checkpoints[max(checkpoints)]
    return f"the last checkpoint is {last}: {command} goes on"


def checkpoint_folder(run: Path, round: int) -> Path:
    """Returns the folder of a round's checkpoint.

    Example:
        >>> checkpoint_folder(Path("runs/demo"), 7).name
        'round-0007'
    """
    return run / CHECKPOINTS / f"round-{round:04d}"


def newest_checkpoint(run: Path, keep_best: bool) -> Search:
    """Finds the newest valid checkpoint of a run. All files of the checkpoint are read.

    Args:
        run: Folder of the run.
        keep_best: True if the best round becomes the result. A checkpoint then also needs the checkpoint of the best
            round so far.
    """
    skipped: list[str] = []
    for folder in reversed(checkpoints_of(run).values()):  # the newest first
        try:
            return Search(_read(run, folder, keep_best), tuple(skipped))
        except Damaged as damaged:
            skipped.append(f"{folder.name} is skipped: {damaged}")
    return Search(None, tuple(skipped))


def find_checkpoint(run: Path, keep_best: bool) -> Search:
    """Finds the newest valid checkpoint of a run, as `newest_checkpoint` does.

    Raises:
        SettingError: The run has checkpoints, and none of them is valid.
    """
    search = newest_checkpoint(run, keep_best)
    if search.newest is None and search.skipped:
        words = f"a run with a checkpoint that is valid; remove {run / CHECKPOINTS}/round-* to begin it again"
        raise SettingError("resume", f"{run} ({'; '.join(search.skipped)})", words)
    return search


def _read(run: Path, folder: Path, keep_best: bool) -> Checkpoint:
    """Reads a checkpoint.

    Raises:
        Damaged: A file that the run needs to go on has changed.
    """
    number = round_of(folder)
    assert number is not None
    written = manifest.check_whole(folder, number)
    manifest.check_elsewhere(run, written)
    facts = _facts_of(folder)
    # The result of the run may come from the best round, so its checkpoint must be whole, too.
    best = int(facts.get("course", {}).get("best", number))
    if keep_best and best != number:
        try:
            manifest.check_whole(checkpoint_folder(run, best), best)
        except Damaged as damaged:
            raise Damaged(f"round {best}, the best until then, is damaged: {damaged}") from None
    return Checkpoint(folder, written, facts)


def _facts_of(folder: Path) -> dict[str, Any]:
    """Reads the plain values of a checkpoint.

    Raises:
        Damaged: The values cannot be read.
    """
    try:
        facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        # Values that later code reads without a check.
        int(facts["round"])  # raises what is caught below
        int(facts.get("course", {}).get("waited", 0))
        return facts
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{FACTS} cannot be read ({first_line(error)})") from None


def check_resumable(path: Path, config: Config) -> None:
    """Checks that a run can go on from its own files and with its original settings.

    A run that was stopped before the first checkpoint begins again in its folder.

    Args:
        path: Folder of the run.
        config: Settings for the resumed run.

    Raises:
        SettingError: The folder belongs to no run, no checkpoint is valid, a setting has changed that decides the
            result, the run is complete, or early stopping has ended the run and the patience is not larger now.
    """
    if not ((path / "config.toml").is_file() and (path / CHECKPOINTS).is_dir()):
        raise SettingError("resume", path, f"the folder of a run, with its config.toml and its {CHECKPOINTS}")
    search = find_checkpoint(path, config.keep_best)
    if search.newest is None:
        return
    if not (path / "metrics.jsonl").is_file():
        raise SettingError("resume", f"{path} (metrics.jsonl is not there)", "a run with the events of its rounds")
    _check_metrics(path)
    manifest.check_settings(search.newest.manifest, config, path)

    # After the last round a run can still lack its summary, such as on a full disk. Then it only has to write that.
    done = search.newest.round
    has_summary = _summed_up(path) == done
    is_complete = done == config.rounds and has_summary
    if done > config.rounds or is_complete:
        raise SettingError("rounds", config.rounds, f"more than {done}, the rounds that the run in {path} has done")
    waited = int(search.newest.facts.get("course", {}).get("waited", 0))
    has_stopped_early = 0 < config.patience <= waited
    if has_stopped_early and has_summary:
        words = f"more than {waited}, the rounds in a row that did not better the held-out loss, or 0"
        raise SettingError("patience", config.patience, words)


def check_content(path: Path, config: Config, content: manifest.Content) -> None:
    """Checks that a resumed run has its original data, model and code.

    Raises:
        SettingError: The data, the model or the code has changed.
    """
    newest = newest_checkpoint(path, config.keep_best).newest
    if newest is not None:
        manifest.check_content(newest.manifest, content, config, path, newest.folder)


def notes_on(search: Search) -> list[str]:
    """Returns lines for the user on how a run goes on: skipped checkpoints, and changed versions.

    Args:
        search: Outcome of the search for a checkpoint.
    """
    if search.newest is None:
        return ["the run was stopped before its first checkpoint, and begins again"]
    return [*search.skipped, *_other_versions(search.newest.manifest)]


def _other_versions(written: Manifest) -> list[str]:
    """Returns a line on changed versions of Python or of libraries; nothing if no version has changed."""
    now = versions()
    changed = []
    for name, before in written.versions.items():
        if now.get(name) != before:
            changed.append(f"{name} {before} -> {now.get(name, 'none')}")
    if not changed:
        return []
    return [f"other versions than in round {written.round}, so that numbers may differ: {', '.join(changed)}"]


def _check_metrics(path: Path) -> None:
    """Checks that the events of a run can be read. The last line may be cut off.

    Raises:
        SettingError: A line is no event.
    """
    try:
        lines = (path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise SettingError("resume", f"{path} (metrics.jsonl: {error.strerror})", "a folder that can be read") from None
    for number, line in enumerate(lines, 1):
        is_cut_off = number == len(lines) and not line.endswith(b"\n")  # by a kill in the middle of a write
        if not is_event(line) and not is_cut_off:
            words = "a run whose events are JSON objects with a round, a line each"
            raise SettingError("resume", f"{path} (metrics.jsonl, line {number}, is damaged)", words)


def is_event(line: bytes) -> bool:
    r"""Returns True for a line of metrics.jsonl that is a complete event.

    Example:
        >>> is_event(b'{"event": "train", "round": 1}\n'), is_event(b'{"event": "tr')
        (True, False)
    """
    try:
        event = json.loads(line)
        return line.endswith(b"\n") and isinstance(event, dict) and isinstance(event["round"], int)
    except (ValueError, KeyError):
        return False


def _summed_up(path: Path) -> int | None:
    """Returns the last round in a run's summary; None without a summary."""
    try:
        return int(json.loads((path / "summary.json").read_text(encoding="utf-8"))["last_round"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
