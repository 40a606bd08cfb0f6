"""One client's data: what it is, how it lies on the client's disk, and in which order it is trained on.

Shapes: n sequences of at most T tokens.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from fedsplit.corpora.sequences import Sequences
from fedsplit.seeds import derive_seed
from fedsplit.shutdown import cleaned_up
from fedsplit.state.client_store import LostState
from fedsplit.tensor_files import map_tensors, pack, unpack, write_tensors

Rows = TypeVar("Rows", Tensor, Sequences)


@dataclass(frozen=True)
class Shard:
    """One client's data.

    Attributes:
        name: Whose it is.
        train: Its sequences.
        held_out: Sequences that are never trained on.
        shares: How many of both are of which owner, or of another column's value.
        classes: How many classes its texts are sorted into; 0 where tokens are predicted.
    """

    name: str
    train: Sequences
    held_out: Sequences
    shares: Mapping[str, int] = field(default_factory=dict)
    classes: int = 0


def _tensors(rows: Sequences) -> dict[str, Tensor]:
    """Sequences as tensors by name; labels and lengths only where they say more than the tokens do."""
    found = {"ids": rows.ids}
    if rows.labels is not rows.ids:
        found["labels"] = rows.labels
    return found if rows.lengths is None else found | {"lengths": rows.lengths}


def _sequences(tensors: Mapping[str, Tensor]) -> Sequences:
    """The inverse of `_tensors`."""
    return Sequences(tensors["ids"], tensors.get("labels", tensors["ids"]), tensors.get("lengths"))


def _path(root: Path, client: int) -> Path:
    return root / "data" / f"{client:04d}.safetensors"


def write_shard(root: Path, client: int, shard: Shard) -> None:
    """Puts a client's data on its disk.

    Args:
        root: The folder of the clients' disks.
        client: The client.
        shard: Its data.
    """
    facts = {"name": shard.name, "shares": dict(shard.shares), "classes": shard.classes}
    tensors = pack({"train": _tensors(shard.train), "held_out": _tensors(shard.held_out)})
    write_tensors(_path(root, client), tensors, {"shard": json.dumps(facts)})


def read_shard(root: Path, client: int) -> Shard:
    """A client's data from its disk, and nobody else's; mapped, so that only what is used takes memory.

    Raises:
        LostState: There is none.
    """
    path = _path(root, client)
    if not path.exists():
        raise LostState(f"{path}, the data of client {client}, is not there")
    tensors, facts = map_tensors(path)
    groups, about = unpack(tensors), json.loads(facts["shard"])
    return Shard(train=_sequences(groups["train"]), held_out=_sequences(groups["held_out"]), **about)


@contextlib.contextmanager
def on_disks(root: Path, shards: Sequence[Shard]) -> Iterator[None]:
    """Puts each client's data on its own disk, for as long as the context lasts: no text is left in a run's folder.

    What a command left behind that was killed is replaced.

    Args:
        root: The folder of the clients' disks.
        shards: By client.
    """

    def remove() -> None:
        shutil.rmtree(root / "data", ignore_errors=True)
        with contextlib.suppress(OSError):  # others keep something there
            root.rmdir()

    with cleaned_up(remove):
        for client, shard in enumerate(shards):
            write_shard(root, client, shard)
        yield


def batch(blocks: Rows, step: int, size: int, seed: int) -> Rows:
    """The batch of a step: passes over the blocks, each shuffled anew, cut into batches without a gap.

    A function of its arguments alone, so that a client that starts again in the middle continues in order.

    Args:
        blocks: Sequences, or token ids (n, T).
        step: Steps made before this one, over all rounds.
        size: Sequences a batch.
        seed: Decides the order.

    Returns:
        As many sequences, or token ids (size, T).
    """
    positions = range(step * size, (step + 1) * size)
    orders = {epoch: _shuffled(len(blocks), seed, epoch) for epoch in {p // len(blocks) for p in positions}}
    return blocks[[orders[p // len(blocks)][p % len(blocks)] for p in positions]]


def steps_of_epoch(count: int, size: int) -> int:
    """Returns how many steps a pass over so many sequences takes; the last may have fewer than `size` of them."""
    return -(-count // size)


def batch_of_epoch(blocks: Rows, step: int, size: int, seed: int) -> Rows:
    """The batch of a step where whole passes are counted: each pass trains each sequence once.

    As `batch`, but a pass ends with what is left of it, and the next one begins with a batch of its own.

    Args:
        blocks: Sequences, or token ids (n, T).
        step: Steps made before this one, over all rounds.
        size: Sequences a batch.
        seed: Decides the order.

    Returns:
        `size` sequences; fewer at the end of a pass that they do not divide.
    """
    epoch, place = divmod(step, steps_of_epoch(len(blocks), size))
    order = _shuffled(len(blocks), seed, epoch)
    return blocks[order[place * size : (place + 1) * size]]


def _shuffled(count: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


def spread(blocks: Rows, most: int) -> Rows:
    """At most so many blocks (n, T), evenly spaced over all of them, so that no text is favoured."""
    if len(blocks) <= most:
        return blocks
    return blocks[[index * len(blocks) // most for index in range(most)]]
