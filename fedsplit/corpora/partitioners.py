"""Ways to divide sequences among clients without regard to owners, by the partitioners of flwr-datasets."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fedsplit.seeds import derive_seed
from fedsplit.settings.parsing import PartitionSpec

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner


def divide(
    keys: Sequence[str],
    spec: PartitionSpec,
    clients: int,
    seed: int,
    least: int,
) -> list[list[int]]:
    """Divides sequences among clients at random, by a partitioner of flwr-datasets.

    Args:
        keys: Key of each sequence: owner, class or column value. Skewed partitioners draw by key.
        spec: The partitioner and its parameters; not "natural" or "auto".
        clients: Number of clients.
        seed: Seed of the draw.
        least: Number of sequences that each client needs. Only "dirichlet" uses the number, and draws until each client
            has enough.

    Returns:
        Indices into `keys` for each client.

    Raises:
        ValueError, TypeError, ArithmeticError: The partitioner cannot divide these sequences.

    Example:
        >>> parts = divide(["ann"] * 6, PartitionSpec("size", sizes=(4, 2)), clients=2, seed=0, least=1)
        >>> [len(part) for part in parts], sorted(parts[0] + parts[1])
        ([4, 2], [0, 1, 2, 3, 4, 5])
    """
    import datasets  # not at the top: the imports of both libraries take seconds, and the default run needs neither

    datasets.disable_progress_bars()
    generator = torch.Generator().manual_seed(derive_seed(seed, "partition"))
    # Some partitioners cut the data in order, so that clients would get whole owners without a shuffle.
    order = torch.randperm(len(keys), generator=generator).tolist()
    shuffled_keys = [keys[index] for index in order]
    key_numbers = {key: number for number, key in enumerate(sorted(set(keys)))}

    partitioner = _partitioner(spec, clients, seed, least)
    columns = {
        "index": order,
        "key": shuffled_keys,
        "key_number": [key_numbers[key] for key in shuffled_keys],  # one partitioner takes numbers only
    }
    partitioner.dataset = datasets.Dataset.from_dict(columns)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # flwr-datasets warns of every draw that leaves a client too little
        return [list(partitioner.load_partition(client)["index"]) for client in range(clients)]


def _partitioner(spec: PartitionSpec, clients: int, seed: int, least: int) -> Partitioner:
    """Returns the partitioner of flwr-datasets for a specification."""
    from flwr_datasets import partitioner

    if spec.kind == "dirichlet":
        return partitioner.DirichletPartitioner(clients, "key", spec.alpha, min_partition_size=least, seed=seed)
    if spec.kind == "inner-dirichlet":
        return partitioner.InnerDirichletPartitioner(list(spec.sizes), "key_number", spec.alpha, seed=seed)
    if spec.kind == "pathological":
        return partitioner.PathologicalPartitioner(clients, "key", spec.number, "first-deterministic", seed=seed)
    if spec.kind == "shard":
        return partitioner.ShardPartitioner(clients, "key", num_shards_per_partition=spec.number, seed=seed)
    if spec.kind == "size":
        return partitioner.SizePartitioner(list(spec.sizes))

    keyless = {
        "iid": partitioner.IidPartitioner,
        "linear": partitioner.LinearPartitioner,
        "square": partitioner.SquarePartitioner,
        "exponential": partitioner.ExponentialPartitioner,
    }
    return keyless[spec.kind](num_partitions=clients)
