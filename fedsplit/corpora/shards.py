"""The data of one client: sequences, the file on the client's disk, and the order of training batches.

Shapes: n sequences of at most T tokens.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from fedsplit.corpora.sequences import Sequences
from fedsplit.durable import writing
from fedsplit.errors import first_line
from fedsplit.seeds import derive_seed
from fedsplit.shutdown import cleaned_up
from fedsplit.state.client_store import LostState
from fedsplit.tensor_files import map_tensors, pack, unpack, write_tensors

Rows = TypeVar("Rows", Tensor, Sequences)


@dataclass(frozen=True)
class DataSize:
    """Size of a client's data.

    Attributes:
        train: Number of sequences to train on.
        held_out: Number of sequences never trained on.
        classes: Number of classes, under classification; 0 if tokens are predicted.
    """

    train: int = 0
    held_out: int = 0
    classes: int = 0


@dataclass(frozen=True)
class Shard:
    """The data of one client.

    Attributes:
        name: Name of the client: the owner's name, or "client N".
        train: Sequences to train on.
        held_out: Sequences never trained on.
        shares: Number of sequences, including held-out sequences, by owner or by a column's value.
        classes: Number of classes, under classification; 0 if tokens are predicted.
    """

    name: str
    train: Sequences
    held_out: Sequences
    shares: Mapping[str, int] = field(default_factory=dict)
    classes: int = 0

    @property
    def size(self) -> DataSize:
        """Numbers of sequences and classes."""
        return DataSize(len(self.train), len(self.held_out), self.classes)


def _tensors(rows: Sequences) -> dict[str, Tensor]:
    """Returns sequences as tensors by name. `_sequences` is the inverse.

    Labels that equal the tokens, and lengths of sequences without padding, are left out.
    """
    tensors = {"ids": rows.ids}
    if rows.labels is not rows.ids:
        tensors["labels"] = rows.labels
    if rows.lengths is not None:
        tensors["lengths"] = rows.lengths
    return tensors


def _sequences(tensors: Mapping[str, Tensor]) -> Sequences:
    """Returns sequences from a result of `_tensors`."""
    ids = tensors["ids"]
    labels = tensors.get("labels", ids)
    return Sequences(ids, labels, tensors.get("lengths"))


def _folder(root: Path) -> Path:
    return root / "data"


def shard_file(root: Path, client: int) -> Path:
    """Returns the path of a client's data below the folder of the clients' disks."""
    return _folder(root) / f"{client:04d}.safetensors"


def write_shard(root: Path, client: int, shard: Shard) -> None:
    """Writes a client's data to the client's disk.

    Args:
        root: Folder of the clients' disks.
        client: Number of the client.
        shard: The client's data.

    Example:
        >>> import tempfile
        >>> text = Sequences.packed(torch.zeros(3, 8, dtype=torch.long))
        >>> with tempfile.TemporaryDirectory() as root:
        ...     write_shard(Path(root), 0, Shard("ann", train=text, held_out=text[:1]))
        ...     read_shard(Path(root), 0).name
        'ann'
    """
    facts = {"name": shard.name, "shares": dict(shard.shares), "classes": shard.classes}
    tensors = pack({"train": _tensors(shard.train), "held_out": _tensors(shard.held_out)})
    write_tensors(shard_file(root, client), tensors, {"shard": json.dumps(facts)})


def read_shard(root: Path, client: int) -> Shard:
    """Reads a client's data from the client's disk.

    The file is mapped into memory, so that only the sequences in use take up memory.

    Args:
        root: Folder of the clients' disks.
        client: Number of the client.

    Raises:
        LostState: The client's disk has no data, or data that cannot be read.
    """
    path = shard_file(root, client)
    if not path.exists():
        raise LostState(f"{path}, the data of client {client}, is not there")
    try:
        tensors, facts = map_tensors(path)
        description = json.loads(facts["shard"])  # name, shares and classes
    except (OSError, ValueError, KeyError) as error:
        raise LostState(f"{path}, the data of client {client}, cannot be read ({first_line(error)})") from error
    groups = unpack(tensors)
    train = _sequences(groups["train"])
    held_out = _sequences(groups["held_out"])
    return Shard(train=train, held_out=held_out, **description)


def remove_left(root: Path) -> int:
    """Removes the data that a killed command left on the clients' disks.

    Args:
        root: Folder of the clients' disks.

    Returns:
        Number of clients with data. A symbolic link counts as one client, and is removed without its target.

    Raises:
        NotWritten: The data could not be removed.
    """
    folder = _folder(root)
    with writing(folder):
        if folder.is_symlink():
            folder.unlink()
            return 1
        if not folder.is_dir():
            return 0
        clients = set()
        for path in folder.iterdir():
            stem, _, _ = path.name.partition(".safetensors")  # a file that was being written has a longer name
            clients.add(re.sub(r"\D", "", stem))
        shutil.rmtree(folder)
        with contextlib.suppress(OSError):  # the folder also holds state that clients keep for longer
            root.rmdir()
    return len(clients)


@contextlib.contextmanager
def on_disks(root: Path, shards: Sequence[Shard]) -> Iterator[None]:
    """Keeps each client's data on the client's disk inside the context, so that a run's folder retains no text.

    Data left behind by a killed command is replaced. `remove_left` removes such data without a run.

    Args:
        root: Folder of the clients' disks.
        shards: Data of each client.
    """

    def remove() -> None:
        shutil.rmtree(_folder(root), ignore_errors=True)
        with contextlib.suppress(OSError):  # the folder also holds state that clients keep for longer
            root.rmdir()

    with cleaned_up(remove):
        for client, shard in enumerate(shards):
            write_shard(root, client, shard)
        del shards  # where the caller has no use for them either, the memory is free for the whole run
        yield


def batch(blocks: Rows, step: int, size: int, seed: int) -> Rows:
    """Returns the batch of a training step, always of full size.

    The passes over the sequences are shuffled one by one and joined without a gap, and the stream is cut into batches.
    The batch depends on the arguments alone, so that a restarted client continues in order.

    Args:
        blocks: Sequences, or token ids (n, T).
        step: Number of steps before this one, over all rounds.
        size: Sequences in a batch.
        seed: Seed of the order.

    Returns:
        `size` sequences, or token ids (size, T).

    Example:
        >>> blocks = torch.arange(3)[:, None]
        >>> stream = torch.cat([batch(blocks, step, size=2, seed=0) for step in range(3)]).flatten().tolist()
        >>> sorted(stream[:3]), sorted(stream[3:])  # two passes in three batches
        ([0, 1, 2], [0, 1, 2])
    """
    positions = range(step * size, (step + 1) * size)
    # A batch may cross the end of a pass, and a small data set may be passed several times in one batch.
    epochs = {position // len(blocks) for position in positions}
    orders = {epoch: _shuffled(len(blocks), seed, epoch) for epoch in epochs}
    chosen = []
    for position in positions:
        epoch, place = divmod(position, len(blocks))
        chosen.append(orders[epoch][place])
    return blocks[chosen]


def steps_of_epoch(count: int, size: int) -> int:
    """Returns the number of steps in a pass over `count` sequences. The last step may have fewer than `size`.

    Example:
        >>> steps_of_epoch(count=5, size=2)
        3
    """
    return -(-count // size)  # rounded up


def batch_of_epoch(blocks: Rows, step: int, size: int, seed: int) -> Rows:
    """Returns the batch of a training step if training is measured in whole passes (`--train.epochs`).

    Unlike in `batch`, no batch crosses the end of a pass, so that each pass trains each sequence exactly once.

    Args:
        blocks: Sequences, or token ids (n, T).
        step: Number of steps before this one, over all rounds.
        size: Sequences in a batch.
        seed: Seed of the order.

    Returns:
        `size` sequences; fewer in the last batch of a pass.

    Example:
        >>> blocks = torch.arange(3)[:, None]
        >>> [len(batch_of_epoch(blocks, step, size=2, seed=0)) for step in range(4)]
        [2, 1, 2, 1]
    """
    epoch, place = divmod(step, steps_of_epoch(len(blocks), size))
    order = _shuffled(len(blocks), seed, epoch)
    return blocks[order[place * size : (place + 1) * size]]


def _shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """Returns the numbers below `count` in the order of a pass."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


def rows_of(examples: Tensor, rows: int) -> list[int]:
    """Returns the numbers of the sequences that belong to some examples, in order.

    Args:
        examples: Numbers of examples (n,).
        rows: Sequences of each example, such as 2 for pairs.

    Example:
        >>> rows_of(torch.tensor([3, 0]), rows=2)
        [6, 7, 0, 1]
    """
    first = examples[:, None] * rows
    numbers: list[int] = (first + torch.arange(rows)).flatten().tolist()
    return numbers


def spread_examples(sequences: Sequences, most: int, rows: int) -> Sequences:
    """Returns at most `most` sequences, evenly spaced, of examples that are not divided.

    Args:
        sequences: Sequences, `rows` for each example.
        most: Largest number of sequences, at least `rows`.
        rows: Sequences of each example.
    """
    if rows == 1:
        return spread(sequences, most)
    examples = spread(torch.arange(len(sequences) // rows), most // rows)
    return sequences[rows_of(examples, rows)]


def spread(blocks: Rows, most: int) -> Rows:
    """Returns at most `most` sequences, evenly spaced over all sequences, so that no text is favoured.

    Example:
        >>> spread(torch.arange(10), 3).tolist()
        [0, 3, 6]
    """
    if len(blocks) <= most:
        return blocks
    places = [index * len(blocks) // most for index in range(most)]
    return blocks[places]
