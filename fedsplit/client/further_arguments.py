"""Further arguments of objectives and metrics at a client: the aligned mask, and the base model's logits.

Shapes: B sequences of T tokens behind P virtual tokens, V tokens in the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fedsplit.adaptation.base_weights import base_only
from fedsplit.client.link import Link
from fedsplit.model.parts import Bottom, Top
from fedsplit.wire.packets import StepKey


def aligned_mask(labels: Tensor, mask: Tensor | None) -> Tensor:
    """Returns the mask of the predicted positions, aligned with the labels as an objective gets them.

    Args:
        labels: Labels (B, P + T), or classes (B,).
        mask: (B, P + T), 0 on padding; None without padding.

    Returns:
        (B, P + T - 1), False where the label stands on padding; for classes (B,), all True.

    Example:
        >>> aligned_mask(torch.tensor([[5, 6, -100]]), torch.tensor([[1, 1, 0]]))
        tensor([[ True, False]])
    """
    if mask is None or labels.ndim == 1:
        aligned = labels if labels.ndim == 1 else labels[:, 1:]
        return torch.ones_like(aligned, dtype=torch.bool)
    return mask[:, 1:].bool()


class PendingReference:
    """Tokens on their way through the base model. The rows cross beside those of the trained model."""

    def __init__(
        self,
        bottom: Bottom,
        link: Link,
        ids: Tensor,
        mask: Tensor | None,
        key: StepKey,
        micros: int = 1,
        batches: int = 1,
    ) -> None:
        """Sends the hidden states of the base model's first blocks, without waiting.

        Args:
            bottom: First blocks, with adapters.
            link: Way through the trunk.
            ids: Tokens (B, T).
            mask: (B, P + T), 0 on padding; None without padding.
            key: Step of the tokens, with batch and micro-batch.
            micros: Number of micro-batches in the batch.
            batches: Number of batches in the step.
        """
        self._virtual = bottom.virtual
        # The first columns belong to virtual tokens, which the base model does not have.
        self._mask = None if mask is None else mask[:, self._virtual :]
        with base_only(bottom):
            hidden = bottom(ids, self._mask)
        # Under the key of the step itself: the trunk keeps nothing of an evaluation, so the two are never confused.
        self._crossing = link.send(
            hidden,
            key,
            self._mask,
            micros=micros,
            training=False,
            batches=batches,
            is_adapted=False,
        )

    def logits(self, top: Top) -> Tensor:
        """Waits for the trunk, and returns the base model's logits in float32, aligned as `Top.aligned` aligns them.

        Args:
            top: Last blocks and the head, with adapters.

        Returns:
            (B, P + T - 1, V), with zeros before the first token of the text: the base model has no virtual tokens.
        """
        hidden = self._crossing.output()
        with base_only(top):
            states = top.read(hidden, self._mask)
            logits = top.predict(states)[:, :-1].float()
        return functional.pad(logits, (0, 0, self._virtual, 0))
