"""Distillation from the base model (1503.02531): the tuned model stays close to the model that it starts from.

Rule: (1 - alpha) times the cross-entropy with the label, plus alpha T^2 times the Kullback-Leibler divergence of the
tuned model's distribution from the base model's, both at temperature T. The base model has no adapters, at any part.

Needs: the base model's logits. Costs: a second forward through all parts, without gradients.

To write your own objective that compares with the base model, copy this file and pass
`--objective path/to/copy.py:Distillation`.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


class Distillation:
    """Cross-entropy, mixed with the divergence from the base model.

    Example:
        >>> import torch
        >>> logits, base = torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[0.0, 0.0]]])
        >>> labels = torch.tensor([[0]])
        >>> [round(float(Distillation(alpha)(logits, labels, base)), 4) for alpha in (0.0, 1.0)]
        [0.1269, 0.4338]
    """

    def __init__(self, alpha: float = 0.5, temperature: float = 1.0) -> None:
        """Takes the options `--objective.alpha` and `--objective.temperature`.

        Args:
            alpha: Share of the divergence in the loss, from 0 to 1.
            temperature: Temperature T of both distributions, above 0.

        Raises:
            ValueError: An option is out of range.
        """
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is {alpha}; it must be from 0 to 1")
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; it must be above 0")
        self.alpha = alpha
        self.temperature = temperature

    def __call__(self, logits: Tensor, labels: Tensor, reference: Tensor) -> Tensor:
        """Returns the mean loss over all labels except -100.

        Args:
            logits: (B, T, V).
            labels: (B, T).
            reference: The base model's logits (B, T, V).
        """
        predicted = labels != -100
        nats = functional.cross_entropy(logits[predicted], labels[predicted])
        tuned = functional.log_softmax(logits[predicted] / self.temperature, -1)
        base = functional.log_softmax(reference[predicted] / self.temperature, -1)
        # Torch's order of arguments: kl_div(log q, log p) is KL(p ‖ q), here with the base model as p.
        divergence = functional.kl_div(tuned, base, reduction="batchmean", log_target=True)
        # T² makes up for the gradients of the divergence, which shrink like 1 / T².
        return (1 - self.alpha) * nats + self.alpha * self.temperature**2 * divergence
