"""The folder of a study: a folder for each run, found again by a digest of settings, code, data and versions."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedsplit.corpora.loaders import path_of
from fedsplit.durable import open_here, writing
from fedsplit.errors import InputError, SettingError
from fedsplit.events.versions import versions
from fedsplit.federation.manifest import code_of, digest
from fedsplit.federation.resumption import CHECKPOINTS
from fedsplit.results.finished import open_run
from fedsplit.settings.config import OPTIONS, SETTINGS, Config
from fedsplit.settings.flags import settle
from fedsplit.studies.table import FinishedRun

RUNS = "runs"
"""Folder of the runs in a study's folder."""

LOGS = "logs"
"""Folder with what the runs print."""

NO_RESULT_DEPENDS_ON = (
    *("out", "resume", "sinks", "sink_options", "track", "report", "quiet", "json"),
    *("timeout", "startup_deadline", "checkpoint"),
)
"""Settings that are left out of the digest: a finished run holds for other values, too."""

COMPUTES = ("fedsplit", "torch", "transformers", "peft")
"""Packages whose versions belong to the digest: another version may compute other numbers."""

_LONGEST = 80
"""Characters of a label in a folder's name."""


def digest_of(config: Config) -> str:
    """Returns a digest of a run's settings, the user's code, a data set in a single file, and versions (`COMPUTES`).

    Runs with one digest have one result. Modules that the code imports, folders of data and models do not count.

    Example:
        >>> digest_of(Config()) == digest_of(Config(timeout=5.0)), digest_of(Config()) == digest_of(Config(rounds=6))
        (True, False)
    """
    found = versions()
    document: dict[str, Any] = {f"version of {name}": found.get(name) for name in COMPUTES}
    for name, setting in SETTINGS.items():
        value = config.value_of(setting)
        # Defaults are left out, so that a setting that a later version adds makes no other run.
        if value != setting.default and name.partition(".")[0] not in NO_RESULT_DEPENDS_ON:
            document[name] = value
    for table in OPTIONS.values():
        if table not in NO_RESULT_DEPENDS_ON:
            document |= {f"{table}.{key}": value for key, value in getattr(config, table).items()}
    files = {**code_of(config), "dataset": path_of(config.dataset), "data.held_out": Path(config.data.held_out)}
    for name, path in files.items():
        if path.is_file():
            document[f"content of {name}"] = _digest_of_file(path)
    text = json.dumps(document, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def _digest_of_file(path: Path) -> str:
    """Returns the digest of a file, read once for all runs."""
    return digest(path)


def name_of_run(label: str, seed: int, config: Config) -> str:
    """Returns the name of a run's folder.

    Example:
        >>> name_of_run("fedavg, lora.rank 4", 0, Config()).rpartition("-")[0]
        'fedavg-lora.rank-4-seed-0'
    """
    words = re.sub(r"[^\w.+]+", "-", label, flags=re.ASCII).strip("-.")[:_LONGEST]
    # A label may have none of the letters that a folder's name takes.
    pieces = [words] if words else []
    return "-".join([*pieces, f"seed-{seed}", digest_of(config)[:8]])


def finished(folder: Path, label: str, seed: int) -> FinishedRun | None:
    """Returns the run in a folder if the run is complete; None for one that is to be played or goes on."""
    try:
        run = open_run(folder)
    except InputError:
        return None
    if not run.summary.get("complete"):
        return None
    return FinishedRun(folder.name, label, seed, folder, run.config, run.summary)


def opened(folder: Path, label: str, seed: int) -> FinishedRun:
    """Returns a run that has just ended, complete or early.

    Raises:
        InputError: The folder holds no such run.
    """
    run = open_run(folder)
    return FinishedRun(folder.name, label, seed, folder, run.config, run.summary)


def settings_for(folder: Path, config: Config) -> Config:
    """Returns the settings by which a run begins in a folder, or goes on there if it was stopped.

    Raises:
        InputError: The settings of the stopped run cannot be read.
    """
    # A run without a folder of checkpoints has nothing to go on from, and begins again.
    is_begun = (folder / "config.toml").is_file() and (folder / CHECKPOINTS).is_dir()
    if not is_begun:
        return replace(config, out=str(folder))
    changed: dict[str, Any] = {"resume": str(folder), "timeout": config.timeout, "sinks": list(config.sinks)}
    return settle(changed, {"sinks": dict(config.sink_options)})


@contextlib.contextmanager
def occupied(study: Path) -> Iterator[None]:
    """Makes a study's folder, and keeps other sweeps out of it until the context ends.

    Raises:
        SettingError: Another sweep works in the folder.
        NotWritten: The folder cannot be made.
    """
    with writing(study):
        for folder in (study / RUNS, study / LOGS):
            folder.mkdir(parents=True, exist_ok=True)
    with open(study / ".lock", "wb", opener=open_here) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SettingError("out", study, "a folder in which no other sweep is at work") from None
        yield
