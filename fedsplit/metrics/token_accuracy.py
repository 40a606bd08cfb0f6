"""Token accuracy: the share of tokens that the model predicts rightly from the true earlier tokens.

To write your own metric, copy this file and pass `--metric path/to/copy.py:TokenAccuracy`.
"""

from __future__ import annotations

from torch import Tensor


class TokenAccuracy:
    """Share of predicted tokens, or of classes, with the largest logit at the label.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]])
        >>> TokenAccuracy()(logits, torch.tensor([[0, 0, -100]]))  # one of two; the third is not predicted
        (1.0, 2.0)
    """

    def __call__(self, logits: Tensor, labels: Tensor) -> tuple[float, float]:
        """Returns the number of right predictions, and the number of labels.

        Args:
            logits: (B, T, V), or (B, C) for a classifier.
            labels: (B, T), -100 for positions without a prediction; or (B,) for a classifier.
        """
        predicted = labels != -100  # prompts and padding have no label; a classifier's labels all count
        right = (logits.argmax(-1) == labels) & predicted
        return float(right.sum()), float(predicted.sum())
