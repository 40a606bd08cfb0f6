"""A client's data on its disk, and in which order they are trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from fedsplit.corpora.sequences import Sequences
from fedsplit.corpora.shards import (
    Shard,
    batch,
    on_disks,
    read_shard,
    remove_left,
    rows_of,
    spread,
    spread_examples,
    write_shard,
)
from fedsplit.state.client_store import LostState

IDS = torch.arange(12).reshape(3, 4)
KINDS = {
    "packed": Sequences.packed(IDS),
    "completions": Sequences(IDS, IDS.masked_fill(IDS % 3 == 0, -100), torch.tensor([4, 2, 3])),
    "classes": Sequences(IDS, torch.tensor([0, 2, 1])),
}


def same(one: Sequences, other: Sequences) -> bool:
    lengths = (one.lengths is None) == (other.lengths is None)
    pairs = [(one.ids, other.ids), (one.labels, other.labels)]
    pairs += [] if one.lengths is None or other.lengths is None else [(one.lengths, other.lengths)]
    return lengths and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_put_on_a_disk_is_read_again_to_the_bit(kind: str, tmp_path: Path) -> None:
    shard = Shard("Ann Ö.", KINDS[kind], KINDS[kind][:1], {"Ann Ö.": 4}, 3 if kind == "classes" else 0)
    write_shard(tmp_path, 7, shard)
    found = read_shard(tmp_path, 7)
    assert same(found.train, shard.train) and same(found.held_out, shard.held_out)
    assert (found.name, found.shares, found.classes) == (shard.name, shard.shares, shard.classes)
    assert (found.train.labels is found.train.ids) == (kind == "packed")  # kept once


def test_a_client_reads_its_own_and_the_text_does_not_outlive_the_run(tmp_path: Path) -> None:
    """Of what clients keep for longer, nothing goes; of a run that was killed, nothing is taken over."""
    shards = [Shard(name, Sequences.packed(IDS + n), Sequences.packed(IDS)) for n, name in enumerate(("ann", "bob"))]
    for others in (True, False):
        root = tmp_path / f"clients-{others}"
        write_shard(root, 1, replace(shards[1], name="somebody"))
        if others:
            (root / "0001").mkdir()
        with pytest.raises(KeyError), on_disks(root, shards):
            (root / "data" / "0000.safetensors").unlink()
            assert read_shard(root, 1).name == "bob"
            with pytest.raises(LostState, match=r"0000.safetensors, the data of client 0, is not there"):
                read_shard(root, 0)
            raise KeyError
        assert [path.name for path in tmp_path.rglob("*.safetensors")] == []
        assert root.exists() is others


def test_data_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write_shard(tmp_path, 3, Shard("ann", Sequences.packed(IDS), Sequences.packed(IDS)))
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(LostState, match=r"0003.safetensors, the data of client 3, cannot be read \(Error while des"):
        read_shard(tmp_path, 3)
    save_file({"ids": IDS}, path)
    with pytest.raises(LostState, match=r"0003.safetensors, the data of client 3, cannot be read \('shard'\)"):
        read_shard(tmp_path, 3)


@given(n=st.integers(1, 12), size=st.integers(1, 5), seed=st.integers(0, 3))
def test_batches_pass_over_the_data_without_a_gap(n: int, size: int, seed: int) -> None:
    blocks = torch.arange(n)[:, None]
    drawn = torch.cat([batch(blocks, step, size, seed) for step in range(2 * n)]).flatten().tolist()
    for epoch in range(2 * size):
        assert sorted(drawn[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_epochs_are_shuffled_differently() -> None:
    blocks = torch.arange(50)[:, None]
    first, second = (batch(blocks, step, 50, seed=0).flatten().tolist() for step in (0, 1))
    assert first != second
    assert first != sorted(first)


@given(n=st.integers(1, 40), most=st.integers(1, 40))
def test_spread_covers_evenly(n: int, most: int) -> None:
    chosen = spread(torch.arange(n)[:, None], most).flatten().tolist()
    assert len(chosen) == min(n, most) == len(set(chosen))
    gaps = [after - before for before, after in zip(chosen, [*chosen[1:], n], strict=True)]
    assert max(gaps) - min(gaps) <= 1


def test_data_that_a_killed_command_left_are_counted_and_removed(tmp_path: Path) -> None:
    """With what was being written; state that a client keeps stays."""
    assert remove_left(tmp_path) == 0
    shard = Shard("ann", KINDS["packed"], KINDS["packed"])
    for client in (0, 3):
        write_shard(tmp_path, client, shard)
    (tmp_path / "data" / ".0004.safetensors.88.draft").write_text("half")
    (tmp_path / "0003").mkdir()
    assert remove_left(tmp_path) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["0003"]


def test_examples_of_several_sequences_are_spread_whole() -> None:
    ids = torch.arange(20).reshape(10, 2)
    found = spread_examples(Sequences.packed(ids), most=5, rows=2)
    assert found.ids[:, 0].tolist() == [0, 2, 8, 10]
    assert torch.equal(spread_examples(Sequences.packed(ids), 5, rows=1).ids, spread(ids, 5))
    assert rows_of(torch.tensor([4, 0]), rows=2) == [8, 9, 0, 1]
