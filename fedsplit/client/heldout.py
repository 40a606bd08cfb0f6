"""Held-out text, and its measurement through the split: the loss and the metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedsplit.adaptation import lora
from fedsplit.client.client import Client
from fedsplit.corpora.sequences import Sequences, behind
from fedsplit.corpora.shards import Shard, spread
from fedsplit.metrics.metric import Metric, measure
from fedsplit.model.devices import device_of
from fedsplit.scores import Score
from fedsplit.wire.packets import StepKey

Batches = Sequence[tuple[int, Sequences]]
"""Numbers of batches, and their sequences."""


def held_out_batches(shard: Shard, most: int, batch_size: int) -> list[tuple[int, Sequences]]:
    """Returns a client's held-out text in numbered batches.

    Args:
        shard: The client's data.
        most: Sequences at most, spread evenly over all it has.
        batch_size: Sequences a batch.
    """
    return list(enumerate(spread(shard.held_out, most).split(batch_size)))


def sample(batches: Batches, sequences: int, batch_size: int) -> list[tuple[int, Sequences]]:
    """Returns some of the batches, spread evenly: as many as it takes for a number of sequences."""
    chosen = spread(torch.arange(len(batches)), -(-sequences // batch_size))
    return [batches[number] for number in chosen.tolist()]


@torch.no_grad()
def through_split(
    client: Client,
    given: Mapping[str, Tensor],
    round: int,
    batches: Batches,
    metrics: Mapping[str, Metric] | None = None,
) -> list[Score]:
    """Measures each of some batches with the given adapters, and the trunk as it is now.

    The loss is cross-entropy whatever the objective of training is, so that runs can be compared.

    Args:
        client: The client, whose parts are used.
        given: Adapters of bottom and top by exported name.
        round: The round, for the step's key.
        batches: Numbers and sequences.
        metrics: Metrics by name; none where not given.
    """
    lora.write(given, client.bottom, client.top)
    client.bottom.eval()
    client.top.eval()
    measure_batch = _measure_classes if client.top.classifies else _measure_tokens
    device = device_of(client.bottom)
    return [
        measure_batch(client, StepKey(round, client.number, number), rows.to(device), metrics or {})
        for number, rows in batches
    ]


def _measure_tokens(client: Client, key: StepKey, rows: Sequences, metrics: Mapping[str, Metric]) -> Score:
    """Measures how well a client predicts the tokens of a batch."""
    virtual = client.bottom.virtual
    # The first token is not asked for, which only virtual tokens could predict: the same text counts for all.
    labels, _ = behind(virtual + 1, rows.labels[:, 1:], None)
    _, mask = behind(virtual, rows.labels, rows.mask)

    hidden = client.link.evaluate(client.bottom(rows.ids, mask), key, mask)
    states = client.top.read(hidden, mask)
    nats = float(client.top.cross_entropy(states, labels, mask)) * rows.predicted
    # Without metrics no logits are made.
    sums = measure(metrics, *client.top.aligned(states, labels, mask)) if metrics else {}
    return Score(nats, rows.predicted, metrics=sums)


def _measure_classes(client: Client, key: StepKey, rows: Sequences, metrics: Mapping[str, Metric]) -> Score:
    """Measures how well a client predicts the classes of a batch."""
    hidden = client.link.evaluate(client.bottom(rows.ids, rows.mask), key, rows.mask)
    logits, labels = client.top.aligned(client.top.read(hidden, rows.mask), rows.labels, rows.mask)
    nats = torch.nn.functional.cross_entropy(logits, labels) * len(rows)
    right = int((logits.argmax(-1) == labels).sum())
    return Score(float(nats), len(rows), right, measure(metrics, logits, labels))
