"""Held-out text, and the loss on it through the split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fedsplit.adaptation import lora
from fedsplit.client.client import Client
from fedsplit.corpora.sequences import Sequences, behind
from fedsplit.corpora.shards import Shard, spread
from fedsplit.model.devices import device_of
from fedsplit.scores import Score
from fedsplit.wire.packets import StepKey

Batches = Sequence[tuple[int, Sequences]]
"""Numbers of batches, and what is in them."""


def measure(loss_of: Callable[[int, Sequences], Tensor], batches: Batches) -> Score:
    """Measures a model on batches; every token that is predicted counts the same.

    Args:
        loss_of: The number of a batch and its sequences to the mean loss.
        batches: Numbers and sequences.
    """
    total = Score()
    for number, rows in batches:
        total += Score(float(loss_of(number, rows)) * rows.predicted, rows.predicted)
    return total


def held_out_batches(shard: Shard, most: int, batch_size: int) -> list[tuple[int, Sequences]]:
    """A client's held-out text in numbered batches.

    Args:
        shard: The client's data.
        most: Sequences at most, spread evenly over all it has.
        batch_size: Sequences a batch.
    """
    return list(enumerate(spread(shard.held_out, most).split(batch_size)))


def sample(batches: Batches, sequences: int, batch_size: int) -> list[tuple[int, Sequences]]:
    """Some of the batches, spread evenly: as many as it takes for so many sequences."""
    chosen = spread(torch.arange(len(batches)), -(-sequences // batch_size))
    return [batches[number] for number in chosen.tolist()]


@torch.no_grad()
def through_split(client: Client, given: Mapping[str, Tensor], round: int, batches: Batches) -> list[Score]:
    """A client's loss on each of some batches, with the given adapters and the trunk as it is now.

    Args:
        client: Whose parts.
        given: Adapters of bottom and top by exported name.
        round: The round, for the step's key.
        batches: Numbers and sequences.
    """
    lora.write(given, client.bottom, client.top)
    client.bottom.eval()
    client.top.eval()
    device = device_of(client.bottom)

    def loss_of(number: int, rows: Sequences) -> Tensor:
        key, virtual, rows = StepKey(round, client.number, number), client.bottom.virtual, rows.to(device)
        # The first token is not asked for, which only virtual tokens could predict: the same text counts for all.
        labels, _ = behind(virtual + 1, rows.labels[:, 1:], None)
        _, mask = behind(virtual, rows.labels, rows.mask)
        hidden = client.link.evaluate(client.bottom(rows.ids, mask), key, mask)
        return client.top(hidden, labels, mask)

    if client.top.classifies:
        return [_sorted(client, round, number, rows.to(device)) for number, rows in batches]
    return [measure(loss_of, [batch]) for batch in batches]


def _sorted(client: Client, round: int, number: int, rows: Sequences) -> Score:
    """How well a client tells the classes of a batch."""
    key = StepKey(round, client.number, number)
    hidden = client.link.evaluate(client.bottom(rows.ids, rows.mask), key, rows.mask)
    logits = client.top.scores(hidden, rows.mask).float()
    nats = torch.nn.functional.cross_entropy(logits, rows.labels) * len(rows)
    return Score(float(nats), len(rows), int((logits.argmax(-1) == rows.labels).sum()))
