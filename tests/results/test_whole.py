"""The unsplit model with an adapter: scores by hand, and adapters that do not fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import VOCABULARY
from test_client import padded_rows

from fedsplit.corpora.sequences import Sequences
from fedsplit.results.finished import find_adapter
from fedsplit.results.whole import attach, open_base, score
from fedsplit.scores import Score, pooled


class Certain(torch.nn.Module):
    """Gives the token after the one it sees (0, 1, 2, 0 ...) three times the weight of each of the two others."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(math.log(3.0)))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.nn.functional.one_hot((input_ids + 1) % 3, 3) * self.weight)


def test_scores_by_hand() -> None:
    """Of four predictions three are right: -ln 3/5 each, and -ln 1/5 for the other."""
    found = score(Certain(), [Sequences.packed(torch.tensor([[0, 1, 2], [1, 2, 2]]))])
    assert (found.right, found.tokens, found.accuracy) == (3, 4, 0.75)
    assert found.loss == pytest.approx((3 * math.log(5 / 3) + math.log(5)) / 4)
    assert found + Score(1.0, 4, 1) == Score(found.nats + 1.0, 8, 4)


def test_the_loss_is_the_librarys(model_path: Path) -> None:
    model = open_base(model_path, "fp32")
    ids = torch.randint(1, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(1))
    assert score(model, Sequences.packed(ids).split(3)).loss == pytest.approx(
        float(model(input_ids=ids, labels=ids).loss.detach()), rel=1e-6
    )


def test_padding_and_prompts_do_not_count(model_path: Path) -> None:
    rows, model = padded_rows("completions"), open_base(model_path, "fp32")
    found = score(model, rows.split(4))
    one_by_one = pooled(score(model, [one]) for one in rows.split(1))
    assert (found.tokens, found.right) == (rows.predicted, one_by_one.right)
    assert found.nats == pytest.approx(one_by_one.nats, rel=1e-5)
    alone = rows[[3]]
    with torch.no_grad():
        expected = float(model(input_ids=alone.ids, labels=alone.labels).loss)
    assert score(model, [alone]).loss == pytest.approx(expected, rel=1e-6)


def test_an_adapter_comes_and_goes(finished_run: Callable[..., Path]) -> None:
    adapter = find_adapter(finished_run("gpt2"))
    base, ids = open_base(adapter.model_path, "fp32"), torch.arange(12)[None]
    before = base(ids).logits
    model = attach(base, adapter)
    assert not torch.allclose(model(ids).logits, before, atol=1e-3)
    assert torch.equal(model.unload()(ids).logits, before)
