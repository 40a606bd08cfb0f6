"""Dividing at random: every sequence once, drawn from the seed, skewed by the keys where the partitioner says so."""

from __future__ import annotations

import pytest

from fedsplit.corpora.partitioners import divide
from fedsplit.settings.parsing import PartitionSpec, parse_partition

KEYS = ["ann", "bob", "eve"] * 20


@pytest.mark.parametrize("spec", ["iid", "size:30,20,10", "linear", "dirichlet:0.5", "pathological:1", "shard:2"])
def test_every_sequence_goes_to_one_client(spec: str) -> None:
    parts = divide(KEYS, parse_partition(spec), 3, seed=0, least=1)
    assert sorted(index for part in parts for index in part) == list(range(len(KEYS)))


@pytest.mark.parametrize("spec", ["iid", "dirichlet:0.5"])
def test_the_seed_alone_decides(spec: str) -> None:
    first, again, another = (divide(KEYS, parse_partition(spec), 3, seed, least=1) for seed in (1, 1, 2))
    assert first == again != another


def test_a_pathological_client_has_as_many_keys_as_asked_for() -> None:
    for number in (1, 2):
        parts = divide(KEYS, PartitionSpec("pathological", number=number), 3, seed=0, least=1)
        assert [len({KEYS[index] for index in part}) for part in parts] == [number] * 3


def test_more_than_there_is_cannot_be_divided() -> None:
    with pytest.raises(ValueError):
        divide(KEYS, PartitionSpec("size", sizes=(60, 60)), 2, seed=0, least=1)
