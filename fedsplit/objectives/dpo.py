"""Direct preference optimisation (2305.18290): the tuned model learns to prefer chosen texts over rejected ones.

Rule, for a pair with log-ratios c of the chosen and r of the rejected text to the base model:
-log sigmoid(beta (c - r)). With label smoothing e (cDPO): (1 - e) of that, and e of -log sigmoid(-beta (c - r)).
Under `ipo` (2310.12036): (c / tokens of c - r / tokens of r - 1 / (2 beta))², as in TRL.

Needs: data with chosen and rejected texts, and the base model's logits. Costs: a second forward through all parts,
without gradients.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from fedsplit.objectives.log_ratios import log_ratios

LOSSES = ("sigmoid", "ipo")
"""Possible values of `loss_type`."""


class DPO:
    """Loss of pairs, by how much more than the base model the tuned model prefers the chosen text.

    Attributes:
        mean_over: "pairs": the loss is a mean over pairs of rows.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[[2.0, 0.0]], [[2.0, 0.0]]])  # a chosen text of one token, and a rejected one
        >>> labels = torch.tensor([[0], [1]])
        >>> base = torch.zeros(2, 1, 2)
        >>> [round(float(DPO(beta)(logits, labels, base)), 4) for beta in (0.1, 1.0)]
        [0.5981, 0.1269]
    """

    mean_over = "pairs"

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0, loss_type: str = "sigmoid") -> None:
        """Takes the options `--objective.beta`, `--objective.label_smoothing` and `--objective.loss_type`.

        Args:
            beta: Strength of the tie to the base model, above 0.
            label_smoothing: Share of pairs that may be labelled the wrong way round, from 0 to below 0.5.
            loss_type: "sigmoid" or "ipo".

        Raises:
            ValueError: An option is out of range.
        """
        if not beta > 0:
            raise ValueError(f"beta is {beta}; it must be above 0")
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(f"label_smoothing is {label_smoothing}; it must be from 0 to below 0.5")
        if loss_type not in LOSSES:
            raise ValueError(f"loss_type is {loss_type}; it must be {' or '.join(LOSSES)}")
        if label_smoothing and loss_type != "sigmoid":
            raise ValueError(f"label_smoothing is {label_smoothing}; it must be 0 under {loss_type}")
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.loss_type = loss_type

    def __call__(self, logits: Tensor, labels: Tensor, reference: Tensor) -> Tensor:
        """Returns the mean loss over all pairs.

        Args:
            logits: (B, T, V), for chosen and rejected texts in turn.
            labels: (B, T), -100 for prompts and padding.
            reference: The base model's logits (B, T, V).
        """
        chosen, rejected = log_ratios(logits, labels, reference)
        if self.loss_type == "ipo":
            tokens = (labels != -100).sum(-1).clamp(min=1)  # a text without one has the log-ratio 0
            margins = chosen / tokens[0::2] - rejected / tokens[1::2]
            return (margins - 1 / (2 * self.beta)).square().mean()
        margins = self.beta * (chosen - rejected)
        right = -functional.logsigmoid(margins)
        wrong = -functional.logsigmoid(-margins)
        return ((1 - self.label_smoothing) * right + self.label_smoothing * wrong).mean()
