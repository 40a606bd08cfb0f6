"""A file or folder is replaced whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from fedsplit.durable import NotWritten, remove_folder, tidy, write_folder, write_text, writing


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


def test_a_folder_is_removed_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks in between finds it whole or not at all, never with some files missing."""
    write_folder(tmp_path / "out", lambda draft: (draft / "file").write_text("x") and None)
    (tmp_path / ".out.removed").mkdir()
    (tmp_path / ".out.removed" / "file").write_text("of a removal that was killed")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", crash)
        with pytest.raises(NotWritten, match=r"out could not be written \(no space left\)"):
            remove_folder(tmp_path / "out")
    assert (tmp_path / "out" / "file").read_text() == "x"
    remove_folder(tmp_path / "out")
    assert [*tmp_path.iterdir()] == []


def test_what_killed_processes_left_unfinished_is_removed_or_put_back(tmp_path: Path) -> None:
    for name in ("one/.out.draft/sub/.x.7.draft", ".done.removed/file", ".old.before/file", "one/.lost.before/file"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "old").mkdir()
    (tmp_path / "one" / ".text.5.draft").write_text("half")
    for name in (".lock", "draft", "my.draft"):
        (tmp_path / name).write_text("mine")
    assert {path.name for path in tidy(tmp_path)} == {".out.draft", ".done.removed", ".text.5.draft"}
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {".lock", "draft", "my.draft", "one/lost/file"}  # the last one was the only version
    assert tidy(tmp_path) == []


def test_a_full_disk_is_named_alike_whoever_finds_it() -> None:
    errors = [
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ]
    for error in errors:
        with (
            pytest.raises(NotWritten, match=r"^x could not be written \(No space left on device\); what"),
            writing(Path("x")),
        ):
            raise error


def test_a_draft_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / f".summary.json.{os.getpid()}.draft").symlink_to(tmp_path / "mine")
    write_text(tmp_path / "summary.json", "{}")
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "summary.json").is_symlink() and (tmp_path / "summary.json").read_text() == "{}"


def test_a_folder_is_not_put_in_place_before_all_of_its_files_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "out", lambda draft: (draft / "file").write_text("old") and None)
    synced = []

    def sync(path: Path) -> None:
        synced.append(path.name)
        if path.name == "last":
            crash()

    def fill(draft: Path) -> None:
        for name in ("first", "last", "second"):
            (draft / name).write_text(name)

    monkeypatch.setattr("fedsplit.durable.sync", sync)
    with pytest.raises(NotWritten, match=r"out could not be written \(no space left\)"):
        write_folder(tmp_path / "out", fill)
    assert {"first", "last", "second"} >= set(synced) and "last" in synced
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["out", "out/file"]
