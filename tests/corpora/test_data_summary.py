"""Who holds what, as a table, a document and a picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedsplit.corpora.data_summary import as_document, data_notes, plot, table
from fedsplit.corpora.sequences import Row, Sequences, stack
from fedsplit.corpora.sharding import Partition
from fedsplit.corpora.shards import Shard
from fedsplit.errors import InputError


@pytest.fixture
def deal() -> Partition:
    ann = stack([Row([1, 2, 3], [-100, 2, 3], "x"), Row([1, 2], [1, 2], "y")], pad=0)
    bob = Sequences.packed(torch.zeros(1000, 4, dtype=torch.long))
    shards = [Shard("ann", ann, ann[:1], {"x": 2, "y": 1}), Shard("client 1", bob, bob[:2], {"y": 1002})]
    return Partition(shards, "completion", False, "topic", cut=1234, dropped=2)


def test_the_table(deal: Partition) -> None:
    assert [line.split("  ") for line in table(deal)] and [line.split() for line in table(deal)] == [
        ["sequences", "tokens", "held", "out", "tokens", "topic"],
        ["0", "ann", "2", "5", "1", "3", "x", "67%,", "y", "33%"],
        ["client", "1", "1,000", "4,000", "2", "8", "y", "100%"],
        ["all", "1,002", "4,005", "3", "11"],
    ]


def test_many_shares_are_counted_and_not_listed(deal: Partition) -> None:
    many = Shard("eve", deal.shards[0].train, deal.shards[0].train, {f"o{n}": 10 - n for n in range(6)})
    (line,) = [line for line in table(Partition([many], "text", True, "owner", 0, 0)) if "eve" in line]
    assert line.endswith("o0 22%, o1 20%, o2 18%, o3 16% and 2 more")


def test_the_document(deal: Partition) -> None:
    found = as_document(deal)
    assert {key: found[key] for key in ("format", "packed", "by", "cut", "dropped")} == {
        "format": "completion",
        "packed": False,
        "by": "topic",
        "cut": 1234,
        "dropped": 2,
    }
    assert found["clients"][0] == {
        "client": 0,
        "name": "ann",
        "train": {"sequences": 2, "tokens": 5, "predicted": 3},
        "held_out": {"sequences": 1, "tokens": 3, "predicted": 2},
        "shares": {"x": 2, "y": 1},
    }


def test_what_is_lost_is_stated(deal: Partition) -> None:
    (line,) = data_notes(deal)
    assert "padded" in line and "1,234 texts cut" in line and "2 left out" in line
    assert data_notes(Partition(deal.shards, "text", True, "owner", 0, 0)) == []
    for empty, words in ((1, "1 row left out, without text"), (1200, "1,200 rows left out, without text")):
        without = [replace(deal, empty=empty), Partition(deal.shards, "text", True, "owner", 0, 0, empty=empty)]
        assert all(words in line for one in without for line in data_notes(one))
        assert [as_document(one)["empty"] for one in without] == [empty, empty]


def test_the_picture(deal: Partition, tmp_path: Path) -> None:
    plot(deal, tmp_path / "who.svg")
    drawn = (tmp_path / "who.svg").read_text()
    assert "<svg" in drawn
    with pytest.raises(InputError, match=r"plot: .*who\.nothing cannot be written"):
        plot(deal, tmp_path / "who.nothing")
