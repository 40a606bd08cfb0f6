"""The origin of a run's numbers: the commit of the working directory, and nothing that fails a run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fedsplit.events import provenance


def git(folder: Path, *words: str) -> str:
    names = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", *names, *words], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_commit_is_that_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.working_commit() is None
    git(tmp_path, "init", "--quiet")
    assert provenance.working_commit() is None  # a repository without a commit
    (tmp_path / "mine.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "one")
    (tmp_path / "runs").mkdir()  # what a run writes makes nothing dirty
    (tmp_path / "runs" / "x").write_text("1")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert provenance.working_commit() == {"commit": commit, "dirty": False}
    (tmp_path / "mine.py").write_text("2")
    assert provenance.working_commit() == {"commit": commit, "dirty": True}


def test_a_machine_without_git_leaves_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    origin = provenance.provenance()
    assert origin["git"] is None
    assert origin["host"]["cores"] >= 1 and origin["versions"]["torch"]
    assert origin["date"].endswith("+00:00")
