"""Preference accuracy and margin: whether, and how much, the tuned model prefers chosen texts more than the base does.

Both are measured in every run on pairs, and need the base model's logits. Rewards are those of DPO (2305.18290): beta
times the log-ratio of the tuned model's probability to the base model's.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fedsplit.metrics.metric import Metric, measure
from fedsplit.objectives.log_ratios import log_ratios
from fedsplit.objectives.objective import Objective, demands_of
from fedsplit.scores import Score

PREFERENCE = ("preference_accuracy", "preference_margin")
"""Names of the metrics that every run on pairs has."""


class PreferenceAccuracy:
    """Share of pairs whose chosen text has a larger reward than the rejected text.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[[2.0, 0.0]], [[2.0, 0.0]]])
        >>> PreferenceAccuracy()(logits, torch.tensor([[0], [1]]), torch.zeros(2, 1, 2))
        (1.0, 1.0)
    """

    def __call__(self, logits: Tensor, labels: Tensor, reference: Tensor) -> tuple[float, float]:
        """Returns the number of pairs that are preferred rightly, and the number of pairs.

        Args:
            logits: (B, T, V), for chosen and rejected texts in turn.
            labels: (B, T), -100 for positions without a prediction.
            reference: The base model's logits (B, T, V).
        """
        chosen, rejected = log_ratios(logits, labels, reference)
        return float((chosen > rejected).sum()), float(len(chosen))


class PreferenceMargin:
    """Reward of the chosen text less that of the rejected text.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[[2.0, 0.0]], [[2.0, 0.0]]])
        >>> total, count = PreferenceMargin(beta=0.5)(logits, torch.tensor([[0], [1]]), torch.zeros(2, 1, 2))
        >>> round(total, 4), count
        (1.0, 1.0)
    """

    def __init__(self, beta: float = 0.1) -> None:
        """Takes the option `--metric.preference_margin.beta`; by default the objective's option `beta`.

        Args:
            beta: Factor of the rewards.
        """
        self.beta = beta

    def __call__(self, logits: Tensor, labels: Tensor, reference: Tensor) -> tuple[float, float]:
        """Returns the sum of the margins, and the number of pairs.

        Args:
            logits: (B, T, V), for chosen and rejected texts in turn.
            labels: (B, T), -100 for positions without a prediction.
            reference: The base model's logits (B, T, V).
        """
        chosen, rejected = log_ratios(logits, labels, reference)
        return float(self.beta * (chosen - rejected).sum()), float(len(chosen))


def pair_score(
    objective: Objective,
    metrics: Mapping[str, Metric],
    logits: Tensor,
    labels: Tensor,
    further: Mapping[str, Tensor],
) -> Score:
    """Returns the score of some pairs: the objective's loss and the metrics. The score counts pairs, and not tokens.

    Args:
        objective: Objective over pairs.
        metrics: Metrics by name.
        logits: (B, T, V), for chosen and rejected texts in turn.
        labels: (B, T), -100 for positions without a prediction.
        further: All further arguments that objective and metrics ask for, by name.

    Example:
        >>> import torch
        >>> from fedsplit.objectives.dpo import DPO
        >>> labels = torch.tensor([[0], [1], [0], [1]])
        >>> pair_score(DPO(), {}, torch.zeros(4, 1, 2), labels, {"reference": torch.zeros(4, 1, 2)}).tokens
        2
    """
    pairs = len(labels) // 2
    arguments = {name: further[name] for name in demands_of(objective).further}
    loss = float(objective(logits, labels, **arguments))
    # The sum over the pairs, so that the scores of batches of any size can be added.
    return Score(loss * pairs, pairs, metrics=measure(metrics, logits, labels, further))
