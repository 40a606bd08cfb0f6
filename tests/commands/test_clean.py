"""The command that removes what killed runs have left, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fedsplit.commands.clean import main
from fedsplit.corpora.sequences import Sequences
from fedsplit.corpora.shards import Shard, write_shard
from fedsplit.tensor_files import write_tensors


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that was killed as it wrote its second checkpoint."""
    run = tmp_path / "run"
    for folder in ("checkpoints/round-0001", "checkpoints/.round-0002.draft"):
        write_tensors(run / folder / "state.safetensors", {"x": torch.ones(2)})
    (run / "config.toml").write_text("seed = 1\n")
    (run / ".summary.json.77.draft").write_text("{")
    text = Sequences.packed(torch.zeros(3, 8, dtype=torch.long))
    for client in range(2):
        write_shard(run / "clients", client, Shard("ann", train=text, held_out=text))
    return run


def files(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}


KEPT = {"config.toml", "checkpoints/round-0001/state.safetensors", "checkpoints/.lock"}


def test_text_and_unfinished_files_go_and_all_else_stays(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"removed the text of 2 clients from {run}/clients",
        f"removed 2 unfinished files and folders from {run}",
    ]
    assert files(run) == KEPT and not (run / "clients").exists()
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == f"nothing was left in {run}\n"


def test_what_clients_keep_stays(run: Path) -> None:
    write_tensors(run / "clients" / "0001" / "round-0001.safetensors", {"x": torch.ones(2)})
    assert main([str(run)]) == 0
    assert files(run) == {*KEPT, "clients/0001/round-0001.safetensors"}


def test_a_link_is_removed_and_not_followed(run: Path, tmp_path: Path) -> None:
    """Neither that of the text nor that of a draft."""
    elsewhere = (run / "clients" / "data").rename(tmp_path / "elsewhere")
    (run / "clients" / "data").symlink_to(elsewhere)
    (run / ".adapter.draft").symlink_to(elsewhere)
    assert main([str(run)]) == 0
    assert files(run) == KEPT and len([*elsewhere.iterdir()]) == 2


@pytest.mark.parametrize("name", ["nowhere", "file", "mine"])
def test_any_other_folder_is_refused_and_left_as_it_is(
    name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The runs beside it, too."""
    (tmp_path / "file").write_text("")
    (tmp_path / "mine" / "clients" / "data").mkdir(parents=True)
    (tmp_path / "mine" / "config.toml").write_text("")
    before = files(tmp_path)
    assert main([str(run), str(tmp_path / name)]) == 2
    assert capsys.readouterr().err == (
        f"fedsplit: run: {tmp_path / name} is not possible; "
        "allowed: the folder of a run, with its config.toml and its checkpoints\n"
    )
    assert files(tmp_path) == before


def test_without_a_folder_it_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr().err == "fedsplit: the following arguments are required: RUN; see --help\n"


@pytest.fixture
def at_work(run: Path) -> Iterator[None]:
    """Another process that has the run's lock."""
    hold = "import fcntl, sys; f = open(sys.argv[1], 'wb'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    call = [sys.executable, "-c", hold, str(run / "checkpoints" / ".lock")]
    with subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        yield
        other.kill()


@pytest.mark.usefixtures("at_work")
def test_a_run_that_is_at_work_is_left_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(run)
    assert main([str(run)]) == 2
    assert "allowed: the folder of a run that is not at work any more" in capsys.readouterr().err
    assert files(run) == before


def test_what_cannot_be_removed_is_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("shutil.rmtree", refuse)
    assert main([str(run)]) == 2
    assert "could not be written (Read-only file system)" in capsys.readouterr().err
