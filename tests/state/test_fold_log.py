"""Folded changes are remembered by round."""

from __future__ import annotations

from pathlib import Path

import torch

from fedsplit.lowrank import LowRank
from fedsplit.state.fold_log import FoldLog


def test_what_was_folded_is_remembered_by_round_and_the_last_attempt_counts(tmp_path: Path) -> None:
    log = FoldLog(tmp_path / "folds")
    change = LowRank(torch.randn(3, 2), torch.randn(2, 4))
    for round in (2, 3):
        log.append(round, {"l": change.times(5.0)})
    log.append(2, {"l": change})
    assert log.read(1) == {}
    (back,) = FoldLog(tmp_path / "folds").read(2).values()
    assert torch.equal(back.up, change.up) and torch.equal(back.down, change.down)
    log.forget(2)
    assert log.read(3) == {} and log.read(2)
    FoldLog(tmp_path / "nowhere").forget(0)


def test_only_files_of_later_rounds_are_forgotten(tmp_path: Path) -> None:
    """Rounds beyond the four digits of their names, too. A file named otherwise belongs to no round, and stays."""
    log = FoldLog(tmp_path)
    for round in (9999, 10000):
        log.append(round, {})
    (tmp_path / "round-x.safetensors").write_text("mine")
    log.forget(9999)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-9999.safetensors", "round-x.safetensors"]


def test_changes_are_restored_only_where_they_are_missing(tmp_path: Path) -> None:
    log = FoldLog(tmp_path)
    change = LowRank(torch.randn(3, 2), torch.randn(2, 4))
    log.append(1, {"l": change})
    log.restore(1, {"l": change.times(2.0)})
    log.restore(2, {"l": change})
    log.restore(3, {})
    assert torch.equal(log.read(1)["l"].up, change.up) and log.read(2).keys() == {"l"}
    assert not (tmp_path / "round-0003.safetensors").exists()
