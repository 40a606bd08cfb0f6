"""A file or folder is replaced whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedsplit.durable import NotWritten, write_folder, write_text


def crash(*_: object) -> None:
    raise OSError("no space left")


def test_a_folder_comes_back_where_a_process_ended_between_two_renames(tmp_path: Path) -> None:
    (tmp_path / ".out.before").mkdir()
    (tmp_path / ".out.before" / "file").write_text("old")

    with pytest.raises(NotWritten, match=r"out could not be written \(no space left\); what was there before is whole"):
        write_folder(tmp_path / "out", crash)
    assert (tmp_path / "out" / "file").read_text() == "old"

    write_folder(tmp_path / "out", lambda draft: (draft / "file").write_text("new") and None)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "file").read_text() == "new"


def test_a_text_file_that_cannot_be_written_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.toml"
    write_text(path, "seed = 1\n")
    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(NotWritten, match=r"config\.toml could not be written \(no space left\)"):
        write_text(path, "seed = 2\n")
    assert path.read_text() == "seed = 1\n" and list(tmp_path.iterdir()) == [path]
