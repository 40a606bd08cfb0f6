"""Pairs of texts, of which one is preferred: how much more than the base model the tuned model prefers it.

Rows of a batch are pairs: rows 0, 2, 4, … are the chosen texts, and each next row is the rejected text of the pair.

Shapes: B sequences of T predicted positions, B / 2 pairs, V tokens in the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def log_likelihoods(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the log-probability of each sequence's predicted tokens, summed, (B,).

    Args:
        logits: (B, T, V).
        labels: (B, T), -100 for positions without a prediction.

    Example:
        >>> log_likelihoods(torch.zeros(2, 2, 4), torch.tensor([[1, -100], [2, 3]])) / torch.log(torch.tensor(0.25))
        tensor([1., 2.])
    """
    predicted = labels != -100
    # The clamp is for `gather`, which takes no -100: the product with `predicted` leaves these positions out.
    places = labels.clamp(min=0).unsqueeze(-1)
    of_label = logits.gather(-1, places).squeeze(-1)
    # Not log_softmax, which would make a second tensor (B, T, V).
    by_token = of_label - torch.logsumexp(logits, -1)
    return (by_token * predicted).sum(-1)


def log_ratios(logits: Tensor, labels: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the log-ratios of the tuned model's probability to the base model's: chosen texts, rejected texts.

    Args:
        logits: (B, T, V).
        labels: (B, T), -100 for positions without a prediction.
        reference: The base model's logits (B, T, V).

    Returns:
        Two tensors (B / 2,).

    Example:
        >>> logits = torch.tensor([[[2.0, 0.0]], [[2.0, 0.0]]])
        >>> labels = torch.tensor([[0], [1]])
        >>> chosen, rejected = log_ratios(logits, labels, torch.zeros(2, 1, 2))
        >>> round(float(chosen - rejected), 4)
        2.0
    """
    ratios = log_likelihoods(logits, labels) - log_likelihoods(reference, labels)
    return ratios[0::2], ratios[1::2]
