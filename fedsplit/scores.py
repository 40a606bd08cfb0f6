"""How well something was predicted: one record, whether it was measured through the split or on the unsplit model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """How well a text was predicted.

    Attributes:
        nats: Sum of the losses of all that was predicted.
        tokens: How many tokens were predicted; sequences, where their classes are.
        right: How many of them rightly. Through the split that is counted of classes alone.
    """

    nats: float = 0.0
    tokens: int = 0
    right: int = 0

    @property
    def loss(self) -> float:
        """Mean loss in nats a token; its exponential is the perplexity."""
        return self.nats / self.tokens

    @property
    def accuracy(self) -> float:
        """The share that was predicted rightly, where it was counted."""
        return self.right / self.tokens

    def __add__(self, other: Score) -> Score:
        return Score(self.nats + other.nats, self.tokens + other.tokens, self.right + other.right)


def pooled(scores: Iterable[Score]) -> Score:
    """Several scores as one; of nothing, no tokens."""
    return sum(scores, Score())
