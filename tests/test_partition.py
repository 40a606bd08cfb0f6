"""Who owns what: nothing twice, nothing trained on that is held out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.config import BUNDLED_MODEL, SettingError
from fedsplit.partition import Shard, batch, make_shards, spread


def shards(dataset: str, spec: str, clients: int, length: int = 64, seed: int = 0) -> list[Shard]:
    return make_shards(dataset, spec, clients, length, seed, BUNDLED_MODEL, end=0)


def rows(*tensors: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for tensor in tensors for row in tensor.tolist()]


def test_the_first_eight_presidents_after_1945() -> None:
    names = [shard.name for shard in shards("sotu", "auto", 8)]
    assert names == [
        "Harry S. Truman",
        "Dwight D. Eisenhower",
        "John F. Kennedy",
        "Lyndon B. Johnson",
        "Richard Nixon",
        "Gerald R. Ford",
        "Jimmy Carter",
        "Ronald Reagan",
    ]


@pytest.mark.parametrize(("spec", "clients"), [("auto", 8), ("natural", 14), ("auto", 15), ("dirichlet:0.5", 4)])
def test_no_block_has_two_owners_or_is_both_trained_on_and_held_out(spec: str, clients: int) -> None:
    dealt = shards("sotu", spec, clients, length=128)
    assert len(dealt) == clients
    everything = [row for shard in dealt for row in rows(shard.train.ids, shard.held_out.ids)]
    assert len(everything) == len(set(everything))
    assert all(len(shard.train) and len(shard.held_out) for shard in dealt)
    assert all(shard.train.ids.shape[1] == shard.held_out.ids.shape[1] == 128 for shard in dealt)


def test_dirichlet_skews_what_iid_does_not() -> None:
    sizes = {spec: [len(shard.train) for shard in shards("sotu", spec, 5)] for spec in ("iid", "dirichlet:0.1")}
    assert max(sizes["iid"]) - min(sizes["iid"]) <= 2
    assert max(sizes["dirichlet:0.1"]) > 3 * min(sizes["dirichlet:0.1"])


def test_dealing_depends_on_the_seed_alone() -> None:
    first, again, other = (shards("sotu", "iid", 3, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a.train.ids, b.train.ids) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].train.ids, other[0].train.ids)


def test_owners_of_a_file_become_clients(corpus_file: Path) -> None:
    assert [shard.name for shard in shards(str(corpus_file), "natural", 2, length=16)] == ["ann", "bob"]
    assert [shard.name for shard in shards(str(corpus_file), "auto", 2, length=16)] == ["client 0", "client 1"]


@pytest.mark.parametrize(
    ("spec", "clients", "length", "message"),
    [
        ("auto", 10_000, 128, r"clients: 10000 is not possible; allowed: 1 to \d+"),
        ("natural", 15, 128, r"clients: 15 is not possible; allowed: 1 to 14 \(owners"),
        ("dirichlet:0.0001", 100, 128, "partition: dirichlet:0.0001 is not possible"),
    ],
)
def test_too_little_text_is_named(spec: str, clients: int, length: int, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        shards("sotu", spec, clients, length)


def test_a_text_of_one_sequence_is_too_little(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("A short text.")
    with pytest.raises(SettingError, match=r"dataset: a text of 0 sequences .short, 1 in all. is not possible"):
        shards(str(path), "auto", 1)


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
