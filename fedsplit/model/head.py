"""A language model head in which all weights train. The head is not tied to the embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedsplit.model.kernels import causal_loss

HEAD = "lm_head"
"""Name of the head in the library's models, in parts and in PEFT's files."""

HEAD_WEIGHT = f"{HEAD}.weight"
"""Name of the head's weight (V, D) in an adapter's file, where PEFT's `modules_to_save` puts it."""


class WholeHead(nn.Linear):
    """Head with trainable weights in float32, for a base model of any type. Starts as a copy of the base's head."""

    def __init__(self, base: nn.Linear) -> None:
        """Copies the head of the base model.

        Args:
            base: The head of the base model, without a bias. The call does not change the head.
        """
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")  # no memory for a random start
        # A copy also where the base is in float32: the base's weight may be tied to the embedding, which stays
        # frozen.
        self.weight = nn.Parameter(base.weight.detach().to(torch.float32, copy=True))
        self._computing = base.weight.dtype

    def causal_loss(self, hidden: Tensor, labels: Tensor, cap: float | None) -> Tensor:
        """Computes the mean next-token loss; see `fedsplit.model.kernels.causal_loss`."""
        return causal_loss(hidden, self.weight.to(self._computing), labels, cap)
