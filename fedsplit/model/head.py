"""The head, where it trains whole: a weight of its own, apart from the embedding that it may have been tied to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedsplit.model.kernels import causal_loss

HEAD = "lm_head"
"""What the head is called, in the library's models, in our parts and in PEFT's files."""

HEAD_WEIGHT = f"{HEAD}.weight"
"""The exported name of its weight (V, D), as PEFT's `modules_to_save` writes it."""


class WholeHead(nn.Linear):
    """A head that trains whole, in float32, whatever type the base has; with a copy of the base's weights at first."""

    def __init__(self, base: nn.Linear) -> None:
        """Copies a head, which stays as it is.

        Args:
            base: The head of the base model, without a bias.
        """
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight = nn.Parameter(base.weight.detach().to(torch.float32, copy=True))
        self._computing = base.weight.dtype

    def causal_loss(self, hidden: Tensor, labels: Tensor, cap: float | None) -> Tensor:
        """The mean next-token loss; see `fedsplit.model.kernels.causal_loss`."""
        return causal_loss(hidden, self.weight.to(self._computing), labels, cap)
