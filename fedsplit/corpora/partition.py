"""Which client owns which text, and what of it is held out."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fedsplit.allowed import PartitionSpec, SettingError, parse_partition
from fedsplit.config import Config, DataSettings
from fedsplit.corpora.classes import classes_of
from fedsplit.corpora.formats import Fitted, Reading, Texts, by_source, fit, format_of, joined, read_rows
from fedsplit.corpora.sequences import Row, Sequences, stack
from fedsplit.corpora.shards import Shard
from fedsplit.corpora.tables import MADE, Table, read_held_out, read_table
from fedsplit.model.families import read_facts, read_pad
from fedsplit.model.sources import about
from fedsplit.seeds import derive_seed

HELD_OUT_DOCUMENTS = 4
"""Of an owner's texts, every fourth by date is held out; the last one where there are fewer."""

HELD_OUT_BLOCKS = 8
"""Of a client's blocks without owners, every eighth is held out, and at least one."""

_SKEWED = ("dirichlet", "inner-dirichlet", "pathological", "shard")
"""Ways to deal out that give clients other shares of what they deal by."""


@dataclass(frozen=True)
class Partition:
    """A data set, dealt out.

    Attributes:
        shards: A client's each.
        format: What its rows are, one of `fedsplit.allowed.FORMATS`, but not "auto".
        packed: Whether several texts are put into a sequence.
        by: What the shards' shares are of: "owner", or a column.
        cut: Texts that lost their end, since they were longer than a sequence.
        dropped: Texts that were left out, since nothing of them was to be predicted then.
        classes: The names of the classes, under classification.
        empty: Rows that were left out, since there was no text in them.
    """

    shards: list[Shard]
    format: str
    packed: bool
    by: str
    cut: int
    dropped: int
    classes: tuple[str, ...] = ()
    empty: int = 0


def _grouped(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The texts by what they are dealt by, in their order."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.key, []).append(row)
    return groups


def _flat(groups: Iterable[Sequence[Row]]) -> list[Row]:
    return [row for group in groups for row in group]


@dataclass(frozen=True)
class _Dealer:
    """What all ways to deal out have in common.

    Attributes:
        table: The data set.
        reading: How its rows are read.
        length: Tokens of a sequence at most.
        held_out: The table of what is held out; None where it is a part of each client's own.
    """

    table: Table
    reading: Reading
    length: int
    held_out: Table | None

    @property
    def by(self) -> str:
        """What shares are told of."""
        return self.reading.data.label if self.reading.classes else self.key

    @property
    def key(self) -> str:
        """What rows are dealt by."""
        return self.reading.column or "owner"

    @property
    def least(self) -> int:
        """Sequences that a client must have."""
        return 1 if self.held_out else 2

    @property
    def lengths(self) -> str:
        """The sequences' length, in words."""
        return f"of {self.length} tokens" if self.reading.packs else f"of up to {self.length} tokens"

    @cached_property
    def texts(self) -> Texts:
        """Texts that are dealt out."""
        return read_rows(self.table, self.reading)

    @cached_property
    def held_out_texts(self) -> Texts:
        """Texts of the table of what is held out, if there is one."""
        return read_rows(self.held_out, self.reading) if self.held_out else Texts([])

    def fit(self, rows: Sequence[Row]) -> Fitted:
        """Texts to sequences, none of which is of two groups."""
        return joined([fit(own, self.reading, self.length) for own in _grouped(rows).values()])

    def shard(self, name: str, train: Sequence[Row], held_out: Sequence[Row]) -> Shard:
        shares = Counter(row.share or row.key for row in (*train, *held_out))
        pad, classes = self.reading.pad, len(self.reading.classes)
        return Shard(name, stack(train, pad), stack(held_out, pad), dict(sorted(shares.items())), classes)

    def deal(self, shards: list[Shard], fitted: Sequence[Fitted]) -> Partition:
        cut, dropped = sum(one.cut for one in fitted), sum(one.dropped for one in fitted)
        how, empty = self.reading, self.texts.empty + self.held_out_texts.empty
        return Partition(shards, how.format, how.packs, self.by, cut, dropped, how.classes, empty)

    def separate(self) -> Fitted | None:
        """What is held out by the user, as sequences; None where it is a part of each client's own."""
        return self.fit(self.held_out_texts.rows) if self.held_out else None


def _by_owner(dealer: _Dealer) -> tuple[list[Shard], list[str], list[Fitted]]:
    """The shards of all owners who have enough text, the names of those who have not, and all that was fitted."""
    owners, separate = _grouped(dealer.texts.rows), dealer.separate()
    shards, poor, everything = [], [], [separate] if separate else []
    for number, (owner, own) in enumerate(owners.items()):
        if separate is None:
            texts = by_source(own)
            places = set(range(HELD_OUT_DOCUMENTS - 1, len(texts), HELD_OUT_DOCUMENTS)) or {len(texts) - 1}
            train = dealer.fit(_flat(text for place, text in enumerate(texts) if place not in places))
            held_out = dealer.fit(_flat(texts[place] for place in sorted(places)))
            everything += [train, held_out]
        else:
            train, held_out = dealer.fit(own), Fitted(_part(dealer, separate.rows, owner, number, len(owners)))
            everything.append(train)
        if train.rows and held_out.rows:
            shards.append(dealer.shard(owner, train.rows, held_out.rows))
        else:
            poor.append(owner)
    return shards, poor, everything


def _part(dealer: _Dealer, held_out: list[Row], owner: str, number: int, owners: int) -> list[Row]:
    """What a table of held-out text has of an owner; an even part where it does not say whose it is."""
    assert dealer.held_out is not None
    if (dealer.reading.column or dealer.reading.data.owner) in dealer.held_out.columns:
        return [row for row in held_out if row.key == owner]
    return _flat(by_source(held_out)[number::owners])


def _partitioner(spec: PartitionSpec, clients: int, seed: int, least: int) -> Any:
    """A partitioner of flwr-datasets."""
    from flwr_datasets import partitioner as made

    if spec.kind == "dirichlet":
        return made.DirichletPartitioner(clients, "owner", spec.alpha, min_partition_size=least, seed=seed)
    if spec.kind == "inner-dirichlet":
        return made.InnerDirichletPartitioner(list(spec.sizes), "number", spec.alpha, seed=seed)
    if spec.kind == "pathological":
        return made.PathologicalPartitioner(clients, "owner", spec.number, "first-deterministic", seed=seed)
    if spec.kind == "shard":
        return made.ShardPartitioner(clients, "owner", num_shards_per_partition=spec.number, seed=seed)
    if spec.kind == "size":
        return made.SizePartitioner(list(spec.sizes))
    even = {"linear": made.LinearPartitioner, "square": made.SquarePartitioner, "iid": made.IidPartitioner}
    return {**even, "exponential": made.ExponentialPartitioner}[spec.kind](num_partitions=clients)


def _indices(spec: PartitionSpec, owners: Sequence[str], clients: int, seed: int, least: int) -> list[list[int]]:
    """Deals blocks out with a partitioner of flwr-datasets.

    Raises:
        ValueError: It cannot.
    """
    import datasets  # with flwr_datasets, takes seconds to import; the default run needs neither

    datasets.disable_progress_bars()
    generator = torch.Generator().manual_seed(derive_seed(seed, "partition"))
    order = torch.randperm(len(owners), generator=generator).tolist()
    partitioner, numbers = _partitioner(spec, clients, seed, least), {o: n for n, o in enumerate(sorted(set(owners)))}
    columns = {"block": order, "owner": [owners[i] for i in order], "number": [numbers[owners[i]] for i in order]}
    partitioner.dataset = datasets.Dataset.from_dict(columns)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each draw that leaves a client too little, before the error
        return [list(partitioner.load_partition(client)["block"]) for client in range(clients)]


def _by_block(dealer: _Dealer, spec: PartitionSpec, name: str, clients: int, seed: int) -> Partition:
    """Shards of single sequences, whoever wrote them."""
    fitted, separate = dealer.fit(dealer.texts.rows), dealer.separate()
    blocks = by_source(fitted.rows)
    _check_enough(dealer, len(blocks), clients)
    dealt = _dealt(dealer, spec, name, [block[0].key for block in blocks], clients, seed)
    if separate is None:
        parts = [_parted([blocks[index] for index in indices]) for indices in dealt]
    else:
        rests = [_flat(by_source(separate.rows)[n::clients]) for n in range(clients)]
        parts = [(_flat(blocks[index] for index in own), rest) for own, rest in zip(dealt, rests, strict=True)]
        if poor := [f"client {n}" for n, (_, rows) in enumerate(parts) if not rows]:
            words = f"a sequence {dealer.lengths} for each client at least (nothing for {_listed(poor)})"
            raise SettingError("data.held_out", dealer.reading.data.held_out, words)
    shards = [dealer.shard(f"client {client}", *part) for client, part in enumerate(parts)]
    return dealer.deal(shards, [fitted, separate] if separate else [fitted])


def _parted(blocks: Sequence[Sequence[Row]]) -> tuple[list[Row], list[Row]]:
    """Sequences that are trained on, and those that are held out."""
    train = _flat(block for place, block in enumerate(blocks) if place % HELD_OUT_BLOCKS)
    return train, _flat(blocks[::HELD_OUT_BLOCKS])


def _check_enough(dealer: _Dealer, blocks: int, clients: int) -> None:
    """Makes sure that there are sequences for all clients, however they are dealt out."""
    least, table = dealer.least, dealer.table
    if blocks < least:
        found = f"a text of {blocks} sequences ({table.name}, {len(table)} in all)"
        raise SettingError("dataset", found, f"{_number(least)} {dealer.lengths} or more")
    if clients * least > blocks:
        words = f"{_number(least)} {dealer.lengths} a client, of {blocks} there are"
        raise SettingError("clients", clients, f"1 to {blocks // least} ({words})")


def _dealt(
    dealer: _Dealer, spec: PartitionSpec, name: str, keys: Sequence[str], clients: int, seed: int
) -> list[list[int]]:
    """The numbers of each client's sequences, of which it has enough."""
    least = dealer.least
    try:
        dealt = _indices(spec, keys, clients, seed, least)
    except (ValueError, TypeError, ArithmeticError) as error:
        if spec.kind == "dirichlet":
            words = f"fewer clients than {clients}, or a larger ALPHA, so that each client gets {_number(least)}"
            raise SettingError("partition", name, words) from None
        reason = str(error).splitlines()[0].strip().rstrip(".") if str(error) else type(error).__name__
        words = f"a way to deal {len(keys)} sequences of {len(set(keys))} kinds ({dealer.key})"
        words = f"{words} to {clients} clients, {_number(least)} each ({reason})"
        raise SettingError("partition", name, words) from None
    if poor := [client for client, indices in enumerate(dealt) if len(indices) < least]:
        who = f"client {poor[0]} gets {len(dealt[poor[0]])} of {len(keys)}"
        raise SettingError("partition", f"{name} for {clients} clients", f"{_number(least)} or more each ({who})")
    return dealt


def _number(sequences: int) -> str:
    return {1: "one sequence", 2: "two sequences"}[sequences]


def _listed(names: Sequence[str]) -> str:
    shown = [name if len(name) <= 40 else f"{name[:40]}…" for name in names[:3]]  # a column may hold whole texts
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


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
    """Reads a data set and deals it out.

    Args:
        dataset: As `fedsplit.corpora.tables.read_table` takes it.
        partition: "natural" (a client an owner), "iid", "dirichlet:ALPHA" (over the owners), or another that
            `fedsplit.allowed.parse_partition` knows; "auto" is natural for what is made here as far as its owners go,
            and iid otherwise.
        clients: How many.
        length: Tokens of a sequence at most.
        seed: Decides what is dealt to whom, other than by nature.
        model_path: The model's folder, for its tokenizer.
        end: The id of the token that ends a text.
        data: Columns and format.

    Raises:
        SettingError: There is too little text for so many clients, or something is wrong with it.
    """
    data, spec = data or DataSettings(), parse_partition(partition)
    if spec.sizes and len(spec.sizes) != clients:
        raise SettingError("partition", partition, f"as many sizes as there are clients, {clients}")
    table = read_table(dataset, data, seed=seed, owners=clients)
    held_out = read_held_out(dataset, data) if data.held_out else None
    reading = _reading(table, data, model_path, end, spec)
    dealer = _Dealer(table, reading, length, held_out)
    if spec.kind == "natural" or (spec.kind == "auto" and dataset in MADE):
        natural, poor, fitted = _by_owner(dealer)
        if clients <= len(natural):
            return dealer.deal(natural[:clients], fitted)
        if spec.kind == "natural":
            lacking = f", not {_listed(poor)}" if poor else ""
            words = f"1 to {len(natural)} (owners with text enough{lacking}), or --partition iid"
            if not natural:
                lacking = f"no {dealer.key} has text enough (not {_listed(poor)})"
                words = f"none by nature, since {lacking}, but --partition iid"
            raise SettingError("clients", clients, words)
    if spec.kind == "auto":
        spec = PartitionSpec("iid")
    return _by_block(dealer, spec, partition, clients, seed)


def partition_of(config: Config) -> Partition:
    """Returns the data of a run, divided among its clients by `--partition`.

    Args:
        config: The run's settings.

    Raises:
        SettingError: The data set cannot be read, or has too little text for so many clients.
    """
    path = about(config)
    return make_partition(
        config.dataset,
        config.partition,
        config.clients,
        config.train.max_length,
        config.seed,
        path,
        read_facts(path).end,
        config.data,
    )


def shards_of(config: Config) -> list[Shard]:
    """Returns each client's data in a run, in the order of the clients."""
    return partition_of(config).shards


def _reading(
    table: Table, data: DataSettings, model_path: Path, end: int, spec: PartitionSpec, classes: tuple[str, ...] = ()
) -> Reading:
    """How a table's rows are read; texts with classes are dealt by these, where no column is named."""
    format, column = format_of(table, data), spec.column
    if format == "classification":
        classes = classes or classes_of(table, data.label)
        column = column or (data.label if spec.kind in _SKEWED else "")
    return Reading(data, format, column, model_path, end, read_pad(model_path, end), classes)


def all_text(
    dataset: str,
    length: int,
    model_path: Path,
    end: int,
    data: DataSettings | None = None,
    seed: int = 0,
    classes: tuple[str, ...] = (),
) -> dict[str, Sequences]:
    """A data set that nobody trains on, as it is: nothing is held back, and nothing dealt out.

    Args:
        dataset: As `fedsplit.corpora.tables.read_table` takes it.
        length: Tokens of a sequence at most.
        model_path: The model's folder, for its tokenizer.
        end: The id of the token that ends a text.
        data: Columns and format.
        seed: Decides a synthetic one.
        classes: The classes that a model knows, under classification; those of the data set where not given.

    Returns:
        The sequences of each owner who has text for one at least.

    Raises:
        SettingError: Nobody has.
    """
    data = data or DataSettings()
    table = read_table(dataset, data, seed=seed)
    reading = _reading(table, data, model_path, end, PartitionSpec("natural"), classes)
    dealer = _Dealer(table, reading, length, None)
    fitted = {owner: dealer.fit(rows).rows for owner, rows in _grouped(dealer.texts.rows).items()}
    found = {owner: stack(rows, reading.pad) for owner, rows in fitted.items() if rows}
    if not found:
        words = f"a text of {length} tokens or more" if reading.packs else "a text of which something is predicted"
        raise SettingError("dataset", dataset, words)
    return found
