"""Held-out loss: through the split it is the unsplit model's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY
from test_client import make_client

from fedsplit.evaluate import HeldOut, measure, through_split
from fedsplit.partition import Shard
from fedsplit.split import load_whole


def test_means_are_over_tokens_not_over_batches() -> None:
    losses = {0: 1.0, 1: 4.0}
    measured = measure(lambda number, ids: torch.tensor(losses[number]), torch.zeros(3, 5), batch_size=2)
    assert (measured.nats, measured.tokens, measured.loss) == (2 * 4 * 1.0 + 4 * 4.0, 12, 2.0)
    assert (measured + HeldOut(12.0, 12)).loss == pytest.approx(1.5)


def test_the_split_evaluates_as_the_unsplit_model(model_path: Path) -> None:
    """With B = 0 the adapters change nothing, so the base itself is the reference."""
    client, server, given = make_client(model_path, "shared", dropout=0.5)
    blocks = torch.randint(1, VOCABULARY, (7, 9), generator=torch.Generator().manual_seed(4))
    client = type(client)(0, Shard("ann", blocks, blocks), client.bottom, client.top, client.link, client.settings, 0)
    measured = through_split(client, given, round=0, most=100)
    with torch.no_grad():
        expected = float(load_whole(model_path)(input_ids=blocks, labels=blocks).loss)
    assert measured.loss == pytest.approx(expected, rel=1e-6)
    assert measured.tokens == 7 * 8
    assert through_split(client, given, round=0, most=2).tokens == 2 * 8
    assert server.forget_pending() == 0
