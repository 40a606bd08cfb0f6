"""Token accuracy: how many tokens are predicted rightly, each from the true tokens before it.

To write a metric of your own, copy this file and name it by `--metric path/to/copy.py:TokenAccuracy`.
"""

from __future__ import annotations

from torch import Tensor


class TokenAccuracy:
    """The share of predicted tokens, or of classes, with the largest logit at the label.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]])
        >>> TokenAccuracy()(logits, torch.tensor([[0, 0, -100]]))  # one of two; the third is not predicted
        (1.0, 2.0)
    """

    def __call__(self, logits: Tensor, labels: Tensor) -> tuple[float, float]:
        """Returns how many labels were predicted rightly, and how many there are.

        Args:
            logits: (B, T, V), or (B, C) of a classifier.
            labels: (B, T), -100 where nothing is predicted; or (B,).
        """
        predicted = labels != -100
        right = (logits.argmax(-1) == labels) & predicted
        return float(right.sum()), float(predicted.sum())
