"""Further arguments that functions of logits and labels ask for by their signatures."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedsplit.demands import further_of, invented
from fedsplit.errors import SettingError


class Method:
    def __call__(self, logits, labels, *, mask, reference=None):
        raise NotImplementedError


def positional(scores, targets, mask, gamma=2.0, *rest, **options):
    raise NotImplementedError


@pytest.mark.parametrize(
    ("function", "asked"),
    [
        (Method(), {"mask", "reference"}),
        (positional, {"mask"}),
        (lambda logits, labels: 0, set()),
        (lambda *both, **options: 0, set()),
        (lambda logits, labels, hidden_states=None: 0, set()),
        (max, set()),
    ],
)
def test_arguments_are_asked_for_by_name(function: Any, asked: set[str]) -> None:
    assert further_of(function, "objective", "mine") == asked


@pytest.mark.parametrize(
    ("function", "name", "reason"),
    [
        (lambda logits, labels, hidden_states: 0, "hidden_states", "hidden states of other parts stay"),
        (lambda logits, labels, *, attentions: 0, "attentions", "hidden states of other parts stay"),
        (lambda model, inputs: 0, "model", "no party has the whole model"),
        (lambda logits, labels, reference, trunk: 0, "trunk", "parts and adapters stay apart"),
        (lambda logits, labels, weather: 0, "weather", None),
    ],
)
def test_what_a_split_cannot_give_is_refused_by_name(function: Any, name: str, reason: str | None) -> None:
    with pytest.raises(SettingError) as caught:
        further_of(function, "objective", "mine.py:f")
    shown = f" ({reason}" if reason else ","
    assert str(caught.value).startswith(f"objective: mine.py:f, which asks for {name}{shown}")
    assert str(caught.value).endswith("allowed: a function of logits, labels, mask and reference")


def test_a_trial_gets_what_was_asked_for() -> None:
    logits, labels = torch.zeros(2, 3, 5), torch.tensor([[1, 2, -100], [0, 1, 2]])
    further = invented(["reference", "mask"], logits, labels, torch.Generator().manual_seed(0))
    assert further["reference"].shape == logits.shape and not further["reference"].requires_grad
    assert further["mask"].tolist() == [[True, True, False], [True, True, True]]
    assert invented([], logits, labels, torch.Generator()) == {}
