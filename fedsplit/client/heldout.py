"""Held-out text, and its measurement through the split: the loss and the metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedsplit.adaptation import lora
from fedsplit.client.client import Client
from fedsplit.client.further_arguments import PendingReference, aligned_mask
from fedsplit.corpora.sequences import Sequences, behind
from fedsplit.corpora.shards import Shard, spread, spread_examples
from fedsplit.demands import MASK, REFERENCE
from fedsplit.metrics.metric import Metric, asked_by, measure
from fedsplit.metrics.preference import pair_score
from fedsplit.model.devices import device_of
from fedsplit.scores import Score
from fedsplit.wire.packets import StepKey

Batches = Sequence[tuple[int, Sequences]]
"""Numbers of batches, and their sequences."""


def held_out_batches(
    shard: Shard,
    most: int,
    batch_size: int,
    rows: int = 1,
) -> list[tuple[int, Sequences]]:
    """Returns a client's held-out text in numbered batches.

    Args:
        shard: Data of the client.
        most: Largest number of sequences, spread evenly over all held-out sequences.
        batch_size: Sequences in a batch.
        rows: Sequences of an example, such as 2 for pairs. Examples are not divided.
    """
    chosen = spread_examples(shard.held_out, most, rows)
    return list(enumerate(chosen.split(batch_size)))


def sample(batches: Batches, sequences: int, batch_size: int) -> list[tuple[int, Sequences]]:
    """Returns some of the batches, spread evenly.

    Args:
        batches: Numbers of batches, with sequences.
        sequences: Number of sequences to reach.
        batch_size: Sequences in a batch.

    Example:
        >>> from fedsplit.corpora.sequences import Sequences
        >>> ids = torch.ones(2, 3, dtype=torch.long)
        >>> batches = list(enumerate([Sequences(ids, labels=ids)] * 5))
        >>> [number for number, _ in sample(batches, sequences=3, batch_size=2)]
        [0, 2]
    """
    count = -(-sequences // batch_size)  # rounded up
    chosen = spread(torch.arange(len(batches)), count)
    return [batches[number] for number in chosen.tolist()]


@torch.no_grad()
def through_split(
    client: Client,
    given: Mapping[str, Tensor],
    round: int,
    batches: Batches,
    metrics: Mapping[str, Metric] | None = None,
) -> list[Score]:
    """Measures batches with the given adapters and the trunk's newest snapshot.

    The loss is cross-entropy for every objective of training, so that runs can be compared. Only of pairs it is the
    objective's: the likelihood of chosen texts alone says nothing about a preference.

    Args:
        client: The client with the parts.
        given: Adapters of bottom and top by exported name.
        round: Number of the round, for the step's key.
        batches: Numbers of batches, with sequences.
        metrics: Metrics by name; None for no metrics.

    Returns:
        A score for each batch.
    """
    lora.write(given, client.bottom, client.top)
    # Without dropout, which training has turned on in the shared parts.
    client.bottom.eval()
    client.top.eval()
    measure_batch = _measure_classes if client.top.classifies else _measure_tokens
    if client.demands.mean_over == "pairs":
        measure_batch = _measure_pairs
    device = device_of(client.bottom)
    scores = []
    for number, rows in batches:
        key = StepKey(round, client.number, number)
        score = measure_batch(client, key, rows.to(device), metrics or {})
        scores.append(score)
    return scores


def _measure_tokens(
    client: Client,
    key: StepKey,
    rows: Sequences,
    metrics: Mapping[str, Metric],
) -> Score:
    """Measures how well a client predicts the tokens of a batch."""
    virtual = client.bottom.virtual
    # Only virtual tokens could predict the first token. Without it, the same tokens count for all adapter methods.
    labels, _ = behind(virtual + 1, rows.labels[:, 1:], None)
    _, mask = behind(virtual, rows.labels, rows.mask)

    asked = asked_by(*metrics.values())
    reference = PendingReference(client.bottom, client.link, rows.ids, mask, key) if REFERENCE in asked else None
    hidden = client.bottom(rows.ids, mask)
    hidden = client.link.evaluate(hidden, key, mask)
    states = client.top.read(hidden, mask)
    # From a mean to a sum, so that scores of batches of any size can be added.
    nats = float(client.top.cross_entropy(states, labels, mask)) * rows.predicted
    if not metrics:  # logits (B, T, vocabulary) are the largest tensor of an evaluation, and only metrics need them
        return Score(nats, rows.predicted)
    logits, aligned_labels = client.top.aligned(states, labels, mask)
    further = {MASK: aligned_mask(labels, mask)}
    if reference is not None:
        further[REFERENCE] = reference.logits(client.top)
    return Score(nats, rows.predicted, metrics=measure(metrics, logits, aligned_labels, further))


def _measure_classes(
    client: Client,
    key: StepKey,
    rows: Sequences,
    metrics: Mapping[str, Metric],
) -> Score:
    """Measures how well a client predicts the classes of a batch."""
    hidden = client.bottom(rows.ids, rows.mask)
    hidden = client.link.evaluate(hidden, key, rows.mask)
    states = client.top.read(hidden, rows.mask)
    logits, labels = client.top.aligned(states, rows.labels, rows.mask)
    nats = torch.nn.functional.cross_entropy(logits, labels) * len(rows)
    right = int((logits.argmax(-1) == labels).sum())
    sums = measure(metrics, logits, labels, {MASK: aligned_mask(labels, None)})
    return Score(float(nats), len(rows), right, sums)


def _measure_pairs(
    client: Client,
    key: StepKey,
    rows: Sequences,
    metrics: Mapping[str, Metric],
) -> Score:
    """Measures how well a client prefers the chosen texts of a batch. The score counts pairs, and not tokens."""
    virtual = client.bottom.virtual
    labels, _ = behind(virtual + 1, rows.labels[:, 1:], None)
    _, mask = behind(virtual, rows.labels, rows.mask)

    compares = client.demands.compares or REFERENCE in asked_by(*metrics.values())
    reference = PendingReference(client.bottom, client.link, rows.ids, mask, key) if compares else None
    hidden = client.bottom(rows.ids, mask)
    hidden = client.link.evaluate(hidden, key, mask)
    logits, aligned_labels = client.top.aligned(client.top.read(hidden, mask), labels, mask)
    further = {MASK: aligned_mask(labels, mask)}
    if reference is not None:
        further[REFERENCE] = reference.logits(client.top)
    assert client.objective is not None  # cross-entropy is a mean over labels
    return pair_score(client.objective, metrics, logits, aligned_labels, further)
