"""Origin of a run's numbers: date, versions, the commit of the working directory, and the machine."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from typing import Any

from fedsplit.environment import available_cores
from fedsplit.events.versions import versions

GIT_SECONDS = 5.0
"""Longest wait for git. A repository on a slow disk must not hold up a run."""


def provenance() -> dict[str, Any]:
    """Returns the origin of the numbers of a run that begins now, under its keys in summary.json.

    - `date`: Start of the command in UTC, in ISO 8601.
    - `versions`: Versions of Python, fedsplit and the libraries.
    - `git`: `commit` of the working directory, and `dirty`, True if tracked files differ from it; None outside of a
      repository, or without git.
    - `host`: `cores` that the process may use, `system` and `machine`. The name of the machine is left out.

    Example:
        >>> sorted(provenance())
        ['date', 'git', 'host', 'versions']
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "git": working_commit(),
        "host": {"cores": available_cores(), "system": platform.system(), "machine": platform.machine()},
    }


def working_commit() -> dict[str, Any] | None:
    """Returns the commit that is checked out in the working directory, and whether tracked files differ from it.

    Returns:
        `commit`, and `dirty`: None if git could not tell in time. None instead of both without a repository or git.
    """
    commit = _git("rev-parse", "HEAD")
    if not commit:
        return None
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _git(*words: str) -> str | None:
    """Returns what a git command prints; None if the command fails or takes too long."""
    # A repository's own configuration could make git start a program: its file monitor is left out.
    command = ["git", "-c", "core.fsmonitor=false", *words]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # looks on, and writes nothing
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=GIT_SECONDS, env=environment, errors="replace", check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
