"""What is kept is there again, whole, and no more than is needed."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch

from fedsplit.lowrank import LowRank
from fedsplit.model.store import (
    ClientStore,
    FoldLog,
    Kept,
    LostState,
    NotWritten,
    load_tensors,
    pack,
    round_of,
    unpack,
    write_tensors,
)

ONE = {"l.lora_A.weight": torch.ones(1, 2)}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_groups_come_back() -> None:
    groups = {"a": {"x": torch.ones(1)}, "b-1": {"x/y": torch.zeros(2)}}
    back = unpack(pack(groups))
    assert back.keys() == groups.keys() and all(same(back[name], groups[name]) for name in groups)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "x.safetensors"
    write_tensors(path, ONE)

    def crash(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="no space"):
        write_tensors(path, {"l": torch.zeros(3)})
    assert same(load_tensors(path), ONE)


def test_a_client_keeps_what_the_server_accepted_until_it_has_accepted_more(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, 3)
    assert store.load(0) == Kept() and not any(tmp_path.iterdir())

    def kept(round: int) -> Kept:
        return Kept({}, {n: t * round for n, t in ONE.items()}, ONE)

    store.save(1, kept(1), accepted=0)
    for round in (2, 3, 5):  # none of these was accepted
        store.save(round, kept(round), accepted=1)
    assert same(store.load(1).personal, ONE)
    assert same(store.load(5).control, ONE) and store.load(5).held == {}
    store.save(6, kept(6), accepted=5)
    assert same(store.load(5).personal, {n: t * 5 for n, t in ONE.items()})
    with pytest.raises(LostState, match="0003 has nothing of round 1, which the server has accepted"):
        store.load(1)
    assert ClientStore(tmp_path, 4).load(5) == Kept()


def test_who_never_has_anything_to_keep_leaves_no_file(tmp_path: Path) -> None:
    ClientStore(tmp_path, 1).save(1, Kept(), accepted=0)
    assert not (tmp_path / "0001").exists()
    store = ClientStore(tmp_path, 0)
    store.save(1, Kept(held=ONE), accepted=0)
    store.save(2, Kept(), accepted=1)  # nothing, and known to be nothing
    assert store.load(2) == Kept() and same(store.load(1).held, ONE)
    late = ClientStore(tmp_path, 2)
    late.save(1, Kept(), accepted=0)
    late.save(2, Kept(held=ONE), accepted=1)
    assert late.load(1) == Kept()


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


def test_rounds_are_told_by_their_numbers(tmp_path: Path) -> None:
    """Beyond the four digits of their names, too; what is named otherwise is nobody's round, and stays."""
    log = FoldLog(tmp_path)
    for round in (9999, 10000):
        log.append(round, {})
    (tmp_path / "round-x.safetensors").write_text("mine")
    log.forget(9999)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-9999.safetensors", "round-x.safetensors"]
    names = {"round-0003": 3, "round-12345.safetensors": 12345, "round-x": None, "round-3-old": None, "round-": None}
    assert {name: round_of(Path(name)) for name in names} == names


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, ONE)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(NotWritten, match=r"x\.safetensors could not be written \(.*too large"):
            write_tensors(path, {"big": torch.ones(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert same(load_tensors(path), ONE) and list(tmp_path.iterdir()) == [path]
    with pytest.raises(NotWritten, match=r"below/x\.safetensors could not be written \(Not a directory"):
        write_tensors(path / "below" / "x.safetensors", ONE)
