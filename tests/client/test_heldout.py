"""Held-out loss: through the split it is the unsplit model's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY
from test_client import make_client, padded_rows
from torch.nn import functional

from fedsplit.client.heldout import held_out_batches, sample, through_split
from fedsplit.corpora.sequences import Sequences
from fedsplit.corpora.shards import Shard
from fedsplit.model.kernels import IGNORED
from fedsplit.model.parts import Bottom
from fedsplit.model.unsplit import load_unsplit
from fedsplit.objectives.label_smoothing import LabelSmoothing
from fedsplit.scores import pooled


def test_the_split_evaluates_as_the_unsplit_model(model_path: Path) -> None:
    """With B = 0 the adapters change nothing, so the base itself is the reference."""
    client, server, given = make_client(model_path, "shared", dropout=0.5)
    blocks = torch.randint(1, VOCABULARY, (7, 9), generator=torch.Generator().manual_seed(4))
    shard = Shard("ann", Sequences.packed(blocks), Sequences.packed(blocks))
    client = replace(client, shard=shard)
    batches = held_out_batches(client.shard, 100, 3)
    measured = pooled(through_split(client, given, 0, batches))
    with torch.no_grad():
        expected = float(load_unsplit(model_path)(input_ids=blocks, labels=blocks).loss)
    assert measured.loss == pytest.approx(expected, rel=1e-6)
    assert measured.tokens == 7 * 8
    assert [part.tokens for part in through_split(client, given, 0, held_out_batches(client.shard, 2, 3))] == [2 * 8]
    assert len(server.steps) == 0


@pytest.mark.parametrize("virtual", [False, True])
def test_metrics_get_aligned_logits_of_what_the_loss_is_of(model_path: Path, virtual: bool) -> None:
    """A metric that is the loss gives the loss, whatever training minimises; virtual tokens are not measured."""
    client, _, given = make_client(model_path, "frozen")
    rows = padded_rows("completions")
    objective = LabelSmoothing(0.5)
    client = replace(client, shard=Shard("ann", rows, rows), objective=objective)
    if virtual:
        client = replace(client, bottom=with_two_more_tokens(client.bottom))

    def nats(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
        total = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return float(total), float((labels != IGNORED).sum())

    batches = held_out_batches(client.shard, 100, 2)
    measured = pooled(through_split(client, given, 0, batches, {"nats": nats}))
    total, count = measured.metrics["nats"]
    assert count == measured.tokens == rows.predicted
    assert total == pytest.approx(measured.nats, rel=1e-5)
    assert pooled(through_split(client, given, 1, batches)).metrics == {}


def with_two_more_tokens(bottom: Bottom) -> Bottom:
    """A bottom that puts two virtual tokens before the text: the hidden states of its first token, twice."""

    class Longer(type(bottom)):  # type: ignore[misc]
        virtual = 2

        def forward(self, ids, mask=None):
            return super().forward(torch.cat([ids[:, :1], ids[:, :1], ids], dim=1), mask)

    bottom.__class__ = Longer
    return bottom


def test_padded_sequences_are_pooled_by_what_they_predict(model_path: Path) -> None:
    """Batches of two that differ in length and in what is predicted: the unsplit model's sum over all of them."""
    client, _, given = make_client(model_path, "frozen")
    rows = padded_rows("completions")
    client = replace(client, shard=Shard("ann", rows, rows))
    measured = through_split(client, given, 0, held_out_batches(client.shard, 100, 2))
    whole, nats = load_unsplit(model_path), 0.0
    with torch.no_grad():
        for one in rows.split(1):
            nats += float(whole(input_ids=one.ids, labels=one.labels).loss) * one.predicted
    assert sum(part.tokens for part in measured) == rows.predicted
    assert sum(part.nats for part in measured) == pytest.approx(nats, rel=1e-5)


def test_a_sample_is_spread_over_the_batches() -> None:
    train, held_out = (Sequences.packed(ids) for ids in (torch.zeros(1, 2), torch.arange(40).reshape(20, 2)))
    shard = Shard("ann", train, held_out)
    batches = held_out_batches(shard, 12, 2)
    assert [number for number, _ in batches] == [0, 1, 2, 3, 4, 5]
    assert [number for number, _ in sample(batches, 5, 2)] == [0, 2, 4]
    assert sample(batches, 0, 2) == []
    assert len(sample(batches, 100, 2)) == 6
