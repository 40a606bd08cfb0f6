"""Divides the sequences of a table among clients, by owner or at random. Each client holds some sequences out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from fedsplit.corpora.classes import classes_of
from fedsplit.corpora.data_table import Table
from fedsplit.corpora.formats import Reading, Texts, format_of, read_rows
from fedsplit.corpora.packing import Fitted, by_source, fit, joined
from fedsplit.corpora.partitioners import divide
from fedsplit.corpora.sequences import Row, stack
from fedsplit.corpora.shards import Shard
from fedsplit.corpora.tables import check_packing
from fedsplit.errors import SettingError, first_line
from fedsplit.model.facts import read_pad
from fedsplit.settings.choices import PAIRS
from fedsplit.settings.parsing import PartitionSpec
from fedsplit.settings.sections import DataSettings

HELD_OUT_DOCUMENTS = 4
"""Every fourth text of an owner, by date, is held out; the last text of an owner who has fewer."""


HELD_OUT_BLOCKS = 8
"""Every eighth sequence of a client without an owner is held out, and at least one."""


_SKEWED = ("dirichlet", "inner-dirichlet", "pathological", "shard")
"""Partitioners that give clients different distributions of a key."""


@dataclass(frozen=True)
class Partition:
    """A data set, divided among clients.

    Attributes:
        shards: Data of each client.
        format: Format of the rows, one of `fedsplit.settings.choices.FORMATS` except "auto".
        packed: True if a sequence may hold several texts.
        by: Column whose distribution the data summary reports; "owner" by default.
        cut: Number of texts that were longer than a sequence, and lost their end.
        dropped: Number of texts with nothing left to predict after the cut, which are left out.
        classes: Names of the classes, under classification.
        empty: Number of rows without text, which are left out.
    """

    shards: list[Shard]
    format: str
    packed: bool
    by: str
    cut: int
    dropped: int
    classes: tuple[str, ...] = ()
    empty: int = 0


@dataclass(frozen=True)
class Sharder:
    """A data set about to be divided, with the steps that all partitions share.

    Attributes:
        table: The data set.
        reading: Way to read the rows of the table.
        length: Largest number of tokens in a sequence.
        held_out: Separate table of held-out texts; None if each client holds out a part of its texts.
    """

    table: Table
    reading: Reading
    length: int
    held_out: Table | None

    @property
    def key(self) -> str:
        """Column that texts are divided by."""
        return self.reading.column or "owner"

    @property
    def summary_column(self) -> str:
        """Column whose distribution the data summary reports."""
        return self.reading.data.label if self.reading.classes else self.key

    @property
    def least(self) -> int:
        """Smallest number of a client's sequences: one for training and, without a separate table, one held out."""
        return 1 if self.held_out else 2

    @property
    def length_in_words(self) -> str:
        """Length of the sequences, for messages."""
        return f"of {self.length} tokens" if self.reading.packs else f"of up to {self.length} tokens"

    @cached_property
    def texts(self) -> Texts:
        """Texts of the data set, as tokens."""
        return read_rows(self.table, self.reading)

    @cached_property
    def held_out_texts(self) -> Texts:
        """Texts of the separate held-out table, as tokens."""
        return read_rows(self.held_out, self.reading) if self.held_out else Texts([])

    def fit(self, texts: Sequence[Row]) -> Fitted:
        """Cuts or packs texts into sequences. No sequence mixes two keys."""
        groups = by_key(texts).values()
        return joined([fit(group, self.reading, self.length) for group in groups])

    def fit_held_out(self) -> Fitted | None:
        """Cuts or packs the separate held-out table into sequences; None without a separate table."""
        return self.fit(self.held_out_texts.rows) if self.held_out else None

    def shard(self, name: str, train: Sequence[Row], held_out: Sequence[Row]) -> Shard:
        """Returns the data of one client.

        Args:
            name: Name of the client.
            train: Sequences to train on.
            held_out: Sequences never trained on.
        """
        counts = Counter(row.share or row.key for row in (*train, *held_out))
        return Shard(
            name,
            train=stack(train, self.reading.pad),
            held_out=stack(held_out, self.reading.pad),
            shares=dict(sorted(counts.items())),
            classes=len(self.reading.classes),
        )

    def partition(self, shards: list[Shard], fitted: Sequence[Fitted]) -> Partition:
        """Returns the divided data set.

        Args:
            shards: Data of each client.
            fitted: Results of all calls of `fit`, for the counts of texts cut and dropped.
        """
        return Partition(
            shards,
            format=self.reading.format,
            packed=self.reading.packs,
            by=self.summary_column,
            cut=sum(part.cut for part in fitted),
            dropped=sum(part.dropped for part in fitted),
            classes=self.reading.classes,
            empty=self.texts.empty + self.held_out_texts.empty,
        )


def reading_of(
    table: Table,
    data: DataSettings,
    model_path: Path,
    end: int,
    spec: PartitionSpec,
    classes: tuple[str, ...] = (),
) -> Reading:
    """Returns the way to read a table.

    Skewed partitions of classified texts are by class, unless `--partition` names a column.

    Args:
        table: The data set.
        data: Columns and format.
        model_path: Folder of the model, for the tokenizer.
        end: Id of the token that ends a text.
        spec: The partition.
        classes: Classes of the model, for a classifier; by default the classes of the table.
    """
    format = format_of(table, data)
    check_packing(replace(data, format=format))
    column = spec.column
    if format == "classification":
        classes = classes or classes_of(table, data.label)
        if not column and spec.kind in _SKEWED:
            column = data.label
    return Reading(data, format, column, model_path, end, read_pad(model_path, end), classes)


def by_key(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Groups rows by key, in order of first appearance.

    Example:
        >>> rows = [Row([1], [1], "bob"), Row([2], [2], "ann"), Row([3], [3], "bob")]
        >>> {key: len(group) for key, group in by_key(rows).items()}
        {'bob': 2, 'ann': 1}
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.key, []).append(row)
    return groups


def _flat(groups: Iterable[Sequence[Row]]) -> list[Row]:
    return [row for group in groups for row in group]


def shards_by_owner(sharder: Sharder) -> tuple[list[Shard], list[str], list[Fitted]]:
    """Makes one shard for each owner.

    Returns:
        Shards of the owners with enough text, names of the owners with too little, and everything that was fitted.
    """
    by_owner = by_key(sharder.texts.rows)
    separate = sharder.fit_held_out()

    # Texts are split before they are packed: a packed sequence would mix training text and held-out text.
    shards: list[Shard] = []
    lacking: list[str] = []
    fitted = [separate] if separate else []
    for number, (owner, texts) in enumerate(by_owner.items()):
        if separate is None:
            train_texts, held_out_texts = _split_documents(texts)
            train = sharder.fit(train_texts)
            held_out = sharder.fit(held_out_texts)
            fitted += [train, held_out]
        else:
            train = sharder.fit(texts)
            held_out = Fitted(_held_out_of_owner(sharder, separate.rows, owner, number, len(by_owner)))
            fitted.append(train)

        # A client without text to train on has no step, and a client without held-out text no loss.
        if train.rows and held_out.rows:
            shards.append(sharder.shard(owner, train.rows, held_out.rows))
        else:
            lacking.append(owner)
    return shards, lacking, fitted


def _split_documents(texts: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Splits an owner's texts into training texts and held-out texts. The turns of a chat stay together."""
    documents = by_source(texts)
    last = len(documents) - 1
    every_fourth = range(HELD_OUT_DOCUMENTS - 1, len(documents), HELD_OUT_DOCUMENTS)
    held_out_places = every_fourth or range(last, last + 1)
    train = [document for place, document in enumerate(documents) if place not in held_out_places]
    held_out = [documents[place] for place in held_out_places]
    return _flat(train), _flat(held_out)


def _held_out_of_owner(
    sharder: Sharder,
    held_out: list[Row],
    owner: str,
    number: int,
    owners: int,
) -> list[Row]:
    """Returns an owner's part of the separate held-out table: the owner's rows, or without owners an even part."""
    assert sharder.held_out is not None
    owner_column = sharder.reading.column or sharder.reading.data.owner
    if owner_column in sharder.held_out.columns:
        return [row for row in held_out if row.key == owner]
    return _flat(by_source(held_out)[number::owners])  # every owner gets texts from the whole table


def too_few_owners(sharder: Sharder, clients: int, owners: int, lacking: Sequence[str]) -> SettingError:
    """Returns the error for more clients than owners with enough text."""
    if not owners:
        reason = f"no {sharder.key} has text enough (not {_listed(lacking)})"
        return SettingError("clients", clients, f"none by nature, since {reason}, but --partition iid")
    without = f", not {_listed(lacking)}" if lacking else ""
    return SettingError("clients", clients, f"1 to {owners} (owners with text enough{without}), or --partition iid")


def partition_by_sequence(
    sharder: Sharder,
    spec: PartitionSpec,
    name: str,
    clients: int,
    seed: int,
) -> Partition:
    """Divides single sequences among clients, without regard to owners.

    Args:
        sharder: The data set.
        spec: The partition.
        name: The partition in the form of the setting, for messages.
        clients: Number of clients.
        seed: Seed of the division.

    Raises:
        SettingError: A client gets too few sequences.
    """
    fitted = sharder.fit(sharder.texts.rows)
    separate = sharder.fit_held_out()
    blocks = by_source(fitted.rows)  # sequences of one chat stay with one client
    _check_length(sharder, len(blocks), fitted.dropped)
    _check_enough(sharder, len(blocks), clients)
    keys = [block[0].key for block in blocks]
    indices = _divided(sharder, spec, name, keys, clients, seed)

    if separate is None:
        parts = [_split_blocks([blocks[index] for index in part]) for part in indices]
    else:
        separate_blocks = by_source(separate.rows)
        # In turn, so that every client gets text from the whole table.
        held_out = [_flat(separate_blocks[client::clients]) for client in range(clients)]
        _check_held_out(sharder, held_out)
        train = [_flat(blocks[index] for index in part) for part in indices]
        parts = list(zip(train, held_out, strict=True))

    shards = [sharder.shard(f"client {client}", *part) for client, part in enumerate(parts)]
    return sharder.partition(shards, [fitted, separate] if separate else [fitted])


def _split_blocks(blocks: Sequence[Sequence[Row]]) -> tuple[list[Row], list[Row]]:
    """Splits a client's sequences into training sequences and held-out sequences."""
    train = [block for place, block in enumerate(blocks) if place % HELD_OUT_BLOCKS]
    held_out = blocks[::HELD_OUT_BLOCKS]  # from the first on, so that there is at least one
    return _flat(train), _flat(held_out)


def _check_length(sharder: Sharder, blocks: int, dropped: int) -> None:
    """Checks that sequences are long enough to leave something to predict behind the prompts.

    Args:
        sharder: The data set.
        blocks: Number of rows that keep something to predict.
        dropped: Number of texts of which nothing was left to predict.

    Raises:
        SettingError: Too few rows keep something to predict, because of the length.
    """
    if blocks >= sharder.least or not dropped:
        return
    where = " in both texts" if sharder.reading.format == PAIRS else ""
    kept = f"{blocks} of the {len(sharder.table)} rows of {sharder.table.name} keep something to predict{where}"
    allowed = f"a length that reaches beyond the prompts: with this one {kept}"
    raise SettingError("train.max_length", sharder.length, allowed)


def _check_enough(sharder: Sharder, blocks: int, clients: int) -> None:
    """Checks that the number of sequences suffices for all clients under an even division."""
    least = sharder.least
    table = sharder.table
    if blocks < least:
        found = f"a text of {blocks} sequences ({table.name}, {len(table)} in all)"
        raise SettingError("dataset", found, f"{_number(least)} {sharder.length_in_words} or more")
    if clients * least > blocks:
        needed = f"{_number(least)} {sharder.length_in_words} a client, of {blocks} there are"
        raise SettingError("clients", clients, f"1 to {blocks // least} ({needed})")


def _check_held_out(sharder: Sharder, held_out: Sequence[Sequence[Row]]) -> None:
    """Checks that every client gets a sequence of the separate held-out table."""
    lacking = [f"client {client}" for client, rows in enumerate(held_out) if not rows]
    if lacking:
        needed = f"a sequence {sharder.length_in_words} for each client at least (nothing for {_listed(lacking)})"
        raise SettingError("data.held_out", sharder.reading.data.held_out, needed)


def _divided(
    sharder: Sharder,
    spec: PartitionSpec,
    name: str,
    keys: Sequence[str],
    clients: int,
    seed: int,
) -> list[list[int]]:
    """Returns the indices of each client's sequences, after a check that every client gets enough."""
    least = sharder.least
    try:
        indices = divide(keys, spec, clients, seed, least)
    except (ValueError, TypeError, ArithmeticError) as error:
        if spec.kind == "dirichlet":  # the partitioner has given up drawing
            needed = f"fewer clients than {clients}, or a larger ALPHA, so that each client gets {_number(least)}"
        else:
            reason = first_line(error).rstrip(".")
            needed = (
                f"a way to divide {len(keys)} sequences of {len(set(keys))} kinds ({sharder.key}) "
                f"among {clients} clients, {_number(least)} each ({reason})"
            )
        raise SettingError("partition", name, needed) from None

    for client, part in enumerate(indices):
        if len(part) < least:
            needed = f"{_number(least)} or more each (client {client} gets {len(part)} of {len(keys)})"
            raise SettingError("partition", f"{name} for {clients} clients", needed)
    return indices


def _number(sequences: int) -> str:
    return {1: "one sequence", 2: "two sequences"}[sequences]


def _listed(names: Sequence[str]) -> str:
    """Lists the first three names, each shortened: a column may hold whole texts."""
    shortened = [name if len(name) <= 40 else f"{name[:40]}…" for name in names[:3]]
    shown = ", ".join(shortened)
    more = len(names) - 3
    return f"{shown} and {more} more" if more > 0 else shown
