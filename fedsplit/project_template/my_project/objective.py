"""The loss that training minimises."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

IGNORED = -100
"""Label of a position at which nothing is predicted."""


class Focal:
    """Focal loss (1708.02002): right predictions count less."""

    def __init__(self, gamma: float = 1.0) -> None:
        """Takes the exponent; 0 gives the cross-entropy."""
        self.gamma = gamma

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the mean loss over all predicted tokens.

        Args:
            logits: Logits (B, T, V), of B sequences of T positions over V tokens.
            labels: Tokens (B, T), or -100 where nothing is predicted.
        """
        losses = functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
        is_predicted = labels.flatten() != IGNORED
        of_right_token = (-losses).exp()
        return ((1 - of_right_token) ** self.gamma * losses)[is_predicted].mean()
