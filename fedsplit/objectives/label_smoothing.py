"""Label smoothing (1512.00567): the target is a mixture of the label and of all tokens alike.

Rule: (1 - smoothing) times the cross-entropy with the label, plus smoothing times the mean cross-entropy with each of
the V tokens. With smoothing = 0 it is cross-entropy.

To write an objective of your own, copy this file and name it by `--objective path/to/copy.py:LabelSmoothing`.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


class LabelSmoothing:
    """Cross-entropy with smoothed labels.

    Example:
        >>> import torch
        >>> logits, labels = torch.tensor([[[2.0, 0.0], [5.0, 5.0]]]), torch.tensor([[0, -100]])
        >>> round(float(LabelSmoothing(0.0)(logits, labels)), 4), round(float(LabelSmoothing(0.5)(logits, labels)), 4)
        (0.1269, 0.6269)
    """

    def __init__(self, smoothing: float = 0.1) -> None:
        """Takes the option `--objective.smoothing`.

        Args:
            smoothing: Share of the target that is spread over all tokens, from 0 to below 1.
        """
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing is {smoothing}; it must be from 0 to below 1")
        self.smoothing = smoothing

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the mean over all labels that are not -100, which torch's function leaves out by itself.

        Args:
            logits: (B, T, V), or (B, C) of a classifier.
            labels: (B, T), or (B,).
        """
        return functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), label_smoothing=self.smoothing)
