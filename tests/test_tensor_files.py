"""Tensors come back from their files, whole or not at all."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import pytest
import torch

from fedsplit.durable import NotWritten
from fedsplit.tensor_files import load_tensors, pack, unpack, write_tensors

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


def test_reading_a_file_again_and_again_takes_up_no_memory(tmp_path: Path) -> None:
    """The sizes are above those of which Python has one number for all uses."""
    path = tmp_path / "x.safetensors"
    write_tensors(path, {f"{number}": torch.ones(1000 + number, 2) for number in range(50)})
    load_tensors(path)
    before = sys.getallocatedblocks()
    for _ in range(20):
        load_tensors(path)
    assert sys.getallocatedblocks() - before < 20 * 50


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
