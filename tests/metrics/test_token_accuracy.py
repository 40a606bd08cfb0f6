"""Token accuracy, counted by hand."""

from __future__ import annotations

import torch

from fedsplit.metrics.token_accuracy import TokenAccuracy
from fedsplit.model.kernels import IGNORED


def test_labels_that_are_not_predicted_do_not_count() -> None:
    """Token 0 is the best at every position; two of three labels say so, a fourth is left out."""
    logits = torch.tensor([2.0, 1.0, 0.0]).expand(2, 2, 3)
    assert TokenAccuracy()(logits, torch.tensor([[0, 2], [0, IGNORED]])) == (2.0, 3.0)


def test_classes_count_as_sequences() -> None:
    assert TokenAccuracy()(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])) == (1.0, 2.0)
