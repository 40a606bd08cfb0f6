"""A step's rows, cut into batches and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedsplit.corpora.sequences import behind, predicted
from fedsplit.model.kernels import IGNORED


@dataclass(frozen=True)
class MicroBatch:
    """Some rows of a batch.

    Attributes:
        ids: Tokens (B, T).
        labels: Labels (B, virtual tokens + T), or classes (B,).
        mask: (B, virtual tokens + T), 0 on padding; None where there is none.
        share: Weight of the rows' mean loss in the mean loss of the step.
    """

    ids: Tensor
    labels: Tensor
    mask: Tensor | None
    share: float


def batches_of(
    ids: Tensor, labels: Tensor | None, mask: Tensor | None, batches: int, micros: int, virtual: int
) -> list[list[MicroBatch]]:
    """Returns a step's rows as batches that follow each other, each as micro-batches that are under way at once.

    Labels and mask also have the positions of virtual tokens, of which only the last predicts.

    Args:
        ids: Tokens (B, T) of the step.
        labels: The tokens (B, T), -100 where they are not predicted; all but padding are where None. Or classes (B,).
        mask: (B, T), 0 on padding; None where there is none.
        batches: Number of batches, if there are as many rows.
        micros: Number of micro-batches of each batch, if it has as many rows.
        virtual: Number of virtual tokens before the text.

    Example:
        >>> import torch
        >>> batches = batches_of(torch.ones(4, 3, dtype=torch.long), None, None, batches=2, micros=1, virtual=0)
        >>> [(len(micro.ids), micro.share) for (micro,) in batches]
        [(2, 0.5), (2, 0.5)]
    """
    if labels is None:
        labels = ids if mask is None else ids.masked_fill(mask == 0, IGNORED)
    labels, mask = behind(virtual, labels, mask)
    whole = predicted(labels)
    batches = min(batches, len(ids))
    micros = min(micros, len(ids) // batches)  # as many in each, since the trunk counts them
    masks = [None] * batches if mask is None else mask.tensor_split(batches)
    return [
        _micro_batches(rows, wanted, seen, micros, whole)
        for rows, wanted, seen in zip(ids.tensor_split(batches), labels.tensor_split(batches), masks, strict=True)
    ]


def _micro_batches(ids: Tensor, labels: Tensor, mask: Tensor | None, count: int, whole: int) -> list[MicroBatch]:
    count = min(max(1, count), len(ids))
    masks = [None] * count if mask is None else mask.tensor_split(count)
    split = zip(ids.tensor_split(count), labels.tensor_split(count), masks, strict=True)
    return [MicroBatch(rows, wanted, seen, predicted(wanted) / whole) for rows, wanted, seen in split]
