"""Log-likelihoods of texts, and their ratios to those of the base model."""

from __future__ import annotations

import pytest
import torch

from fedsplit.objectives.log_ratios import log_likelihoods, log_ratios


def test_a_text_without_a_prediction_has_a_likelihood_of_one() -> None:
    assert log_likelihoods(torch.randn(1, 2, 3), torch.tensor([[-100, -100]])).tolist() == [0.0]


def test_large_logits_of_ignored_places_do_no_harm() -> None:
    logits = torch.tensor([[[0.0, 0.0], [1e30, -1e30]]])
    assert float(log_likelihoods(logits, torch.tensor([[1, -100]]))) == pytest.approx(-0.6931472)


def test_gradients_go_to_the_tuned_model_alone() -> None:
    logits = torch.randn(2, 2, 3, requires_grad=True)
    chosen, rejected = log_ratios(logits, torch.tensor([[0, 1], [2, -100]]), torch.randn(2, 2, 3))
    (chosen - rejected).sum().backward()
    assert logits.grad is not None and bool((logits.grad[1, 1] == 0).all()) and bool((logits.grad[0] != 0).all())
