"""The experiment on checkpoints finds what is torn, and finds nothing torn."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from experiments.reliability import checkpoints
from experiments.reliability.checkpoints import adapters_of, fill_disk, kill_repeatedly, open_folder, torn, write_round
from fedsplit.durable import NotWritten
from fedsplit.federation.checkpoint import Snapshot


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Forked processes must not compute in threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_table_is_the_result() -> None:
    result = json.loads(checkpoints.RESULT.read_text())
    kills, disk = result["kill -9"], result["tmpfs"]
    page = checkpoints.RESULT.with_name("README.md").read_text()
    assert f"| {kills['kills']} kills, {kills['in_the_middle']} of them in the middle" in page
    assert f"| {kills['checkpoints']} | the {kills['in_the_middle']} that were under way | 0 | 0 |" in page
    failed = len(disk["failed"])
    assert f"full for {failed} of {disk['rounds']} rounds | {disk['rounds']} | {failed}, each named | 0 | 0 |" in page
    assert (kills["torn"], kills["lost"], disk["torn"]) == ([], 0, [])


def test_kills_in_the_middle_of_checkpoints_tear_none() -> None:
    found = kill_repeatedly(6, seed=1, width=128)
    assert found["kills"] == 6 and found["checkpoints"] >= 6
    assert (found["torn"], found["lost"], found["drafts_left"]) == ([], 0, 0)
    assert found["most_kept"] <= checkpoints.KEEP + 2


def test_checkpoints_that_are_written_in_place_are_torn(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the experiment would see it."""

    def in_place(target: Path, fill: Callable[[Path], None]) -> None:
        target.mkdir()
        fill(target)

    monkeypatch.setattr("fedsplit.federation.checkpoint.write_folder", in_place)
    assert kill_repeatedly(6, seed=1, width=128)["torn"]


def test_values_of_another_round_are_found(tmp_path: Path) -> None:
    """Even where the manifest fits to them."""
    folder = open_folder(tmp_path / "run")
    write_round(folder, 1, width=16)
    assert torn(tmp_path / "run") == []
    groups = {"adapters": {"x": torch.ones(2)}}
    folder.save_round(Snapshot(2, {"after": 1.0}, groups), adapters_of(2, 16))
    assert torn(tmp_path / "run") == ["round-0002 holds values of another round"]


def test_rounds_on_a_full_disk_fail_and_tear_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full from the fifth round to the tenth, by a writer that refuses."""
    write = checkpoints.write_round

    def refuse(folder: object, round: int, width: int) -> None:
        if (tmp_path / "filler").exists():
            raise NotWritten("run could not be written (No space left on device); what was there before is whole")
        write(folder, round, width)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoints, "write_round", refuse)
    monkeypatch.setattr(checkpoints, "_fill", Path.touch)
    found = fill_disk(tmp_path / "run", rounds=12, width=16)
    assert found["failed"] == [5, 6, 7, 8, 9, 10] and found["torn"] == []
    assert found["reasons"] == {"No space left on device": 6} and found["kept"] == [3, 11, 12]
