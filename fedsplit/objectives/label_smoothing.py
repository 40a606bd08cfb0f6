"""Label smoothing (1512.00567): the target is a mixture of the label and of all tokens alike.

Rule: (1 - smoothing) times the cross-entropy with the label, plus smoothing times the mean cross-entropy with each of
the V tokens. With smoothing = 0, label smoothing is cross-entropy.

To write your own objective, copy this file and pass `--objective path/to/copy.py:LabelSmoothing`.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


class LabelSmoothing:
    """Cross-entropy with smoothed labels.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[[2.0, 0.0], [5.0, 5.0]]])
        >>> labels = torch.tensor([[0, -100]])
        >>> losses = [LabelSmoothing(smoothing)(logits, labels) for smoothing in (0.0, 0.5)]
        >>> [round(float(loss), 4) for loss in losses]
        [0.1269, 0.6269]
    """

    def __init__(self, smoothing: float = 0.1) -> None:
        """Takes the option `--objective.smoothing`.

        Args:
            smoothing: Share of the target for all tokens alike, from 0 to below 1.

        Raises:
            ValueError: The share is out of range.
        """
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing is {smoothing}; it must be from 0 to below 1")
        self.smoothing = smoothing

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the mean loss over all labels except -100.

        Args:
            logits: (B, T, V), or (B, C) for a classifier.
            labels: (B, T), or (B,) for a classifier.
        """
        rows = logits.flatten(0, -2)
        # torch leaves out labels of -100 by default.
        return functional.cross_entropy(rows, labels.flatten(), label_smoothing=self.smoothing)
