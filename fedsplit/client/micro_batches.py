"""A step's rows, cut into batches and micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
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
        mask: (B, virtual tokens + T), 0 on padding; None without padding.
        share: Weight of the rows' mean loss in the mean loss of the step.
    """

    ids: Tensor
    labels: Tensor
    mask: Tensor | None
    share: float


def batches_of(
    ids: Tensor, labels: Tensor | None, mask: Tensor | None, batches: int, micros: int, virtual: int
) -> list[list[MicroBatch]]:
    """Cuts the rows of a step into batches, and each batch into micro-batches.

    Batches follow each other, and micro-batches of one batch are on the way at the same time. Labels and mask also have
    the positions of virtual tokens. Only the last virtual token predicts a token of the text.

    Args:
        ids: Tokens (B, T) of the step.
        labels: Tokens (B, T), -100 for tokens that are not predicted; None predicts all tokens but padding. Or classes
            (B,).
        mask: (B, T), 0 on padding; None without padding.
        batches: Number of batches, at most the number of rows.
        micros: Number of micro-batches of each batch, at most the number of rows.
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
    # Counted over the whole step, so that every token weighs the same, whatever the cut into batches.
    whole = predicted(labels)
    batches = min(batches, len(ids))
    # The same number in each batch: the trunk knows the last part of a step by the number of all parts.
    micros = min(micros, len(ids) // batches)
    return [_micro_batches(*rows, micros, whole) for rows in _split(ids, labels, mask, batches)]


def _micro_batches(ids: Tensor, labels: Tensor, mask: Tensor | None, count: int, whole: int) -> list[MicroBatch]:
    """Cuts a batch into micro-batches. The losses of a step are weighted by predictions, of which `whole` has all."""
    count = min(max(1, count), len(ids))
    return [
        MicroBatch(part_ids, part_labels, part_mask, predicted(part_labels) / whole)
        for part_ids, part_labels, part_mask in _split(ids, labels, mask, count)
    ]


def _split(
    ids: Tensor, labels: Tensor, mask: Tensor | None, count: int
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Cuts rows, with labels and mask, into parts of almost equal size."""
    masks = [None] * count if mask is None else mask.tensor_split(count)
    return zip(ids.tensor_split(count), labels.tensor_split(count), masks, strict=True)
