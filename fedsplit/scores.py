"""Scores: how well a model, split or not, predicts some text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

Sums = Mapping[str, tuple[float, float]]
"""By metric, the sum of its values and their number. Sums of batches and of clients add up."""


@dataclass(frozen=True)
class Score:
    """Measurement of some text.

    Attributes:
        nats: Sum of the losses of all predictions.
        tokens: Number of predictions: of tokens, or of classes, one for each text.
        right: Number of right predictions. The split model counts right classes only, never tokens.
        metrics: Sums of the metrics that `--metric` names.

    Example:
        >>> score = Score(nats=6.0, tokens=4) + Score(nats=2.0, tokens=4)
        >>> score.loss
        1.0
    """

    nats: float = 0.0
    tokens: int = 0
    right: int = 0
    metrics: Sums = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """Mean loss in nats a token; its exponential is the perplexity."""
        return self.nats / self.tokens

    @property
    def accuracy(self) -> float:
        """Share of right predictions."""
        return self.right / self.tokens

    def __add__(self, other: Score) -> Score:
        return Score(
            self.nats + other.nats,
            self.tokens + other.tokens,
            self.right + other.right,
            added(self.metrics, other.metrics),
        )


def pooled(scores: Iterable[Score]) -> Score:
    """Returns the sum of scores. Of none it is a score of no tokens.

    Example:
        >>> pooled([Score(nats=6.0, tokens=4), Score(nats=2.0, tokens=4)]).tokens
        8
    """
    return sum(scores, Score())


def added(one: Sums, other: Sums) -> Sums:
    """Adds the metrics' sums of two disjoint sets of text.

    Example:
        >>> added({"rouge": (1.0, 2.0)}, {"rouge": (3.0, 2.0)})
        {'rouge': (4.0, 4.0)}
    """
    joined = dict(one)  # a score is never changed: batches and clients share it
    for name, (total, count) in other.items():
        total_before, count_before = joined.get(name, (0.0, 0.0))
        joined[name] = total_before + total, count_before + count
    return joined


def means(sums: Sums) -> dict[str, float | None]:
    """Returns the mean of each metric; None for a metric without a value.

    Example:
        >>> means({"rouge": (3.0, 4.0), "bleu": (0.0, 0.0)})
        {'rouge': 0.75, 'bleu': None}
    """
    return {name: total / count if count else None for name, (total, count) in sums.items()}


def means_by_metric(sums: Iterable[tuple[str, Sums]]) -> dict[str, dict[str, float | None]]:
    """Returns the means of several owners' sums, by metric and owner.

    Example:
        >>> means_by_metric([("ann", {"rouge": (1.0, 2.0)}), ("bob", {"rouge": (2.0, 2.0)})])
        {'rouge': {'ann': 0.5, 'bob': 1.0}}
    """
    by_metric: dict[str, dict[str, float | None]] = {}
    for owner, sums_of_owner in sums:
        for metric, mean in means(sums_of_owner).items():
            by_metric.setdefault(metric, {})[owner] = mean
    return by_metric
