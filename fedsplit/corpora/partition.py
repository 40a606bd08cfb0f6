"""Divides a data set among clients, and each client's text into training and held-out sequences."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fedsplit.corpora.data_table import Table
from fedsplit.corpora.formats import Reading
from fedsplit.corpora.sequences import Sequences, stack
from fedsplit.corpora.sharding import (
    Partition,
    Sharder,
    by_key,
    partition_by_sequence,
    reading_of,
    shards_by_owner,
    too_few_owners,
)
from fedsplit.corpora.shards import Shard
from fedsplit.corpora.tables import MADE, read_held_out, read_table
from fedsplit.errors import SettingError
from fedsplit.model.facts import read_facts
from fedsplit.model.sources import config_folder
from fedsplit.settings.choices import PAIRS
from fedsplit.settings.config import Config
from fedsplit.settings.parsing import PartitionSpec, parse_partition
from fedsplit.settings.sections import DataSettings


def partition_of(config: Config) -> Partition:
    """Returns the data of a run, divided among the clients by `--partition`.

    Args:
        config: Settings of the run.

    Raises:
        SettingError: The data set cannot be read, or has too little text for so many clients.

    Example:
        >>> partition = partition_of(Config(clients=2, dataset="synthetic"))
        >>> [shard.name for shard in partition.shards]
        ['owner 0', 'owner 1']
    """
    path = config_folder(config.model)
    return make_partition(
        config.dataset,
        config.partition,
        config.clients,
        length=config.train.max_length,
        seed=config.seed,
        model_path=path,
        end=read_facts(path).end,
        data=config.data,
    )


def shard_of_site(config: Config, name: str) -> Shard:
    """Returns the data of a client that reads its own data set. All rows are the client's, whoever owns them.

    Args:
        config: Settings of the run, with the data set of the client.
        name: Name of the client.

    Raises:
        SettingError: The data set cannot be read, or has too little text to train on and to hold out.

    Example:
        >>> shard_of_site(Config(dataset="synthetic"), "ward a").name
        'ward a'
    """
    path = config_folder(config.model)
    with_owners = read_table(config.dataset, config.data, seed=config.seed)
    table = _without_owners(with_owners, config.data, name)
    held_out = None
    if config.data.held_out:
        held_out = _without_owners(read_held_out(config.dataset, config.data), config.data, name)
    # The table has no column of owners any more, and only a column with the default name may be missing.
    data = replace(config.data, owner=DataSettings().owner)
    reading = reading_of(table, data, path, read_facts(path).end, PartitionSpec("natural"))
    sharder = Sharder(table, reading, config.train.max_length, held_out)
    shards, _, _ = shards_by_owner(sharder)
    if not shards:
        allowed = f"a data set with more text, for training and for {config.eval.samples} held-out sequences"
        raise SettingError("dataset", config.dataset, allowed)
    return shards[0]


def _without_owners(table: Table, data: DataSettings, name: str) -> Table:
    """Returns a table whose rows have one owner of a name."""
    of_owners = (data.owner, DataSettings().owner)
    columns = {column: values for column, values in table.columns.items() if column not in of_owners}
    return replace(table, name=name, columns=columns)


def shards_of(config: Config) -> list[Shard]:
    """Returns the data of each client in a run.

    Example:
        >>> [shard.name for shard in shards_of(Config(clients=2, dataset="synthetic"))]
        ['owner 0', 'owner 1']
    """
    return partition_of(config).shards


def make_partition(
    dataset: str,
    partition: str,
    clients: int,
    length: int,
    seed: int,
    model_path: Path,
    end: int,
    data: DataSettings | None = None,
) -> Partition:
    """Reads a data set and divides it among clients.

    Args:
        dataset: Data set, in the form of `fedsplit.corpora.tables.read_table`.
        partition: "natural" (one owner a client), "iid", "dirichlet:ALPHA" (over the owners), or a further form of
            `PARTITION_FORMS`. "auto" is natural for the bundled data sets if there are enough owners, and iid
            otherwise.
        clients: Number of clients.
        length: Largest number of tokens in a sequence.
        seed: Seed of every partition but "natural".
        model_path: Folder of the model, for the tokenizer.
        end: Id of the token that ends a text.
        data: Columns and format.

    Raises:
        SettingError: The data set has too little text for so many clients, or cannot be read.
    """
    data = data or DataSettings()
    spec = parse_partition(partition)
    if spec.sizes and len(spec.sizes) != clients:
        raise SettingError("partition", partition, f"as many sizes as there are clients, {clients}")

    table = read_table(dataset, data, seed=seed, owners=clients)
    held_out = read_held_out(dataset, data) if data.held_out else None
    reading = reading_of(table, data, model_path, end, spec)
    sharder = Sharder(table, reading, length, held_out)

    is_bundled = dataset in MADE
    if spec.kind == "natural" or (spec.kind == "auto" and is_bundled):
        has_owners = data.owner in table.columns and not reading.column
        is_packed_text = reading.packs and reading.format == "text"
        if is_bundled and has_owners and is_packed_text and held_out is None:
            found = _of_first_owners(table, reading, length, clients, data.owner)
            if found is not None:
                return found

        shards, lacking, fitted = shards_by_owner(sharder)
        if clients <= len(shards):
            return sharder.partition(shards[:clients], fitted)
        if spec.kind == "natural":
            raise too_few_owners(sharder, clients, len(shards), lacking)

    # "auto" falls back on iid: for data of the user's, or if there are fewer owners than clients.
    if spec.kind == "auto":
        spec = PartitionSpec("iid")
    return partition_by_sequence(sharder, spec, partition, clients, seed)


def _of_first_owners(
    table: Table,
    reading: Reading,
    length: int,
    clients: int,
    owner_column: str,
) -> Partition | None:
    """Returns the natural partition of a bundled data set, from the text of the first owners only.

    To encode the texts of all owners would take a second. Rows of bundled data sets are never empty, cut or dropped, so
    the first owners are the same as after encoding all.

    Args:
        table: The data set.
        reading: Form of the texts.
        length: Largest number of tokens in a sequence.
        clients: Number of clients.
        owner_column: Name of the column with the owners.

    Returns:
        The partition; None if an owner has too little text for a client.
    """
    few = Sharder(table.of_first(clients, owner_column), reading, length, None)
    shards, _, fitted = shards_by_owner(few)
    return few.partition(shards, fitted) if len(shards) == clients else None


def all_text(
    dataset: str,
    length: int,
    model_path: Path,
    end: int,
    data: DataSettings | None = None,
    seed: int = 0,
    classes: tuple[str, ...] = (),
) -> dict[str, Sequences]:
    """Returns all sequences of a data set by owner, for evaluation.

    Args:
        dataset: Data set, in the form of `fedsplit.corpora.tables.read_table`.
        length: Largest number of tokens in a sequence.
        model_path: Folder of the model, for the tokenizer.
        end: Id of the token that ends a text.
        data: Columns and format.
        seed: Seed of a synthetic data set.
        classes: Classes of the model, for a classifier; by default the classes of the data set.

    Returns:
        Sequences by owner, for every owner with at least one sequence.

    Raises:
        SettingError: No owner has text for a sequence.
    """
    data = data or DataSettings()
    table = read_table(dataset, data, seed=seed)
    reading = reading_of(table, data, model_path, end, PartitionSpec("natural"), classes)
    if reading.format == PAIRS != data.format:  # whoever asks has not made ready for pairs
        needed = f"texts without pairs; --data.format {PAIRS} measures pairs, after a run that was trained on pairs"
        raise SettingError("dataset", dataset, needed)
    sharder = Sharder(table, reading, length, None)

    sequences = {}
    for owner, texts in by_key(sharder.texts.rows).items():
        rows = sharder.fit(texts).rows
        if rows:  # packing drops the rest of a stream, and may leave an owner with little text nothing
            sequences[owner] = stack(rows, reading.pad)
    if not sequences:
        needed = f"a text of {length} tokens or more" if reading.packs else "a text of which something is predicted"
        raise SettingError("dataset", dataset, needed)
    return sequences
