"""Where a run goes on: its newest checkpoint that is valid, and whether settings, data and model fit to it."""

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
    """A checkpoint whose files are all as they were written.

    Attributes:
        folder: Folder of the checkpoint.
        manifest: Its manifest.
        facts: Its plain values.
    """

    folder: Path
    manifest: Manifest
    facts: Mapping[str, Any]

    @property
    def round(self) -> int:
        """The round after which it was written."""
        return self.manifest.round


@dataclass(frozen=True)
class Search:
    """Outcome of the search for a checkpoint.

    Attributes:
        newest: The newest valid checkpoint; None where there is none.
        skipped: A line for each newer checkpoint that is not valid: its name, and why.
    """

    newest: Checkpoint | None
    skipped: tuple[str, ...] = ()


def checkpoints_of(run: Path) -> dict[int, Path]:
    """Returns the folders of a run's checkpoints by round, in the order of the rounds; they need not be valid.

    Example:
        >>> checkpoints_of(Path("nowhere"))
        {}
    """
    folders = {number: folder for folder in (run / CHECKPOINTS).glob("round-*") if (number := round_of(folder))}
    return dict(sorted(folders.items()))


def how_to_go_on(run: Path | None, only_from_checkpoint: bool = False) -> str:
    """Returns the last checkpoint of a run that was stopped, and the command by which the run goes on.

    Args:
        run: The run's folder, which need not be there; None for a run that has no folder yet.
        only_from_checkpoint: True to return nothing where the run has no checkpoint.

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
    """Finds the newest valid checkpoint of a run. All its files are read.

    Args:
        run: The run's folder.
        keep_best: The run leaves its best round, so that a checkpoint needs that of the best round until then, too.
    """
    skipped: list[str] = []
    for folder in reversed(checkpoints_of(run).values()):
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
        Damaged: A file that a run would go on from is not as it was written.
    """
    number = round_of(folder)
    assert number is not None
    written = manifest.check_whole(folder, number)
    manifest.check_elsewhere(run, written)
    facts = _facts_of(folder)
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
        Damaged: They cannot be read.
    """
    try:
        facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        int(facts["round"]), int(facts.get("course", {}).get("waited", 0))
        return facts
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{FACTS} cannot be read ({first_line(error)})") from None


def check_resumable(path: Path, config: Config) -> None:
    """Makes sure that a run can go on, from what it wrote itself and with the settings that it began with.

    A run that was stopped before its first checkpoint can be begun again in its folder.

    Args:
        path: The run's folder.
        config: Settings that the run is to go on with.

    Raises:
        SettingError: The folder is not a run's, none of its checkpoints is valid, a setting that decides the result
            has changed, no round is left to do and the run is summed up, or the run has stopped because its patience
            ran out, and is given no more.
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
    done, facts = search.newest.round, search.newest.facts
    if done > config.rounds or (done == config.rounds and _summed_up(path) == done):
        raise SettingError("rounds", config.rounds, f"more than {done}, the rounds that the run in {path} has done")
    waited = int(facts.get("course", {}).get("waited", 0))
    if 0 < config.patience <= waited and _summed_up(path) == done:
        words = f"more than {waited}, the rounds in a row that did not better the held-out loss, or 0"
        raise SettingError("patience", config.patience, words)


def check_content(path: Path, config: Config, content: manifest.Content) -> None:
    """Makes sure that a run that goes on has the data, the model and the user's code that it began with.

    Raises:
        SettingError: One of them has changed.
    """
    newest = newest_checkpoint(path, config.keep_best).newest
    if newest is not None:
        manifest.check_content(newest.manifest, content, config, path, newest.folder)


def notes_on(search: Search) -> list[str]:
    """Returns what a user should know before a run goes on: a line for each fact.

    Args:
        search: The search for the run's checkpoint.
    """
    if search.newest is None:
        return ["the run was stopped before its first checkpoint, and begins again"]
    return [*search.skipped, *_other_versions(search.newest.manifest)]


def _other_versions(written: Manifest) -> list[str]:
    """Returns a line where the run goes on with other versions of what computes its numbers; else nothing."""
    now = versions()
    changed = []
    for name, before in written.versions.items():
        if now.get(name) != before:
            changed.append(f"{name} {before} -> {now.get(name, 'none')}")
    if not changed:
        return []
    return [f"other versions than in round {written.round}, so that numbers may differ: {', '.join(changed)}"]


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
        if not is_event(line) and (number < len(lines) or line.endswith(b"\n")):
            words = "a run whose events are JSON objects with a round, a line each"
            raise SettingError("resume", f"{path} (metrics.jsonl, line {number}, is damaged)", words)


def is_event(line: bytes) -> bool:
    r"""Tells whether a line of metrics.jsonl is an event that was written to its end.

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
    """Returns the round after which a run was summed up; None where it was not."""
    try:
        return int(json.loads((path / "summary.json").read_text(encoding="utf-8"))["last_round"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
