"""A step's rows, cut into batches and micro-batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedsplit.corpora.sequences import behind
from fedsplit.model.kernels import IGNORED
from fedsplit.objectives.objective import Demands


@dataclass(frozen=True)
class MicroBatch:
    """Some rows of a batch.

    Attributes:
        ids: Tokens (B, T).
        labels: Labels (B, virtual tokens + T), or classes (B,).
        mask: (B, virtual tokens + T), 0 on padding; None without padding.
        share: Weight of the rows' mean loss in the mean loss of the step.
        examples: Number of each row within the client's data; empty if the numbers are not known.
    """

    ids: Tensor
    labels: Tensor
    mask: Tensor | None
    share: float
    examples: tuple[int, ...] = ()


def batches_of(
    ids: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    batches: int,
    micros: int,
    virtual: int,
    demands: Demands | None = None,
) -> list[list[MicroBatch]]:
    """Cuts the rows of a step into batches, and each batch into micro-batches.

    Batches follow each other, and micro-batches of one batch are on the way at the same time. Labels and mask also have
    the positions of virtual tokens. Only the last virtual token predicts a token of the text. Beside the base model,
    which has no virtual tokens, the first token of the text is not predicted.

    Args:
        ids: Tokens (B, T) of the step.
        labels: Tokens (B, T), -100 for tokens that are not predicted; None predicts all tokens but padding. Or classes
            (B,).
        mask: (B, T), 0 on padding; None without padding.
        batches: Number of batches, at most the number of rows.
        micros: Number of micro-batches of each batch, at most the number of rows.
        virtual: Number of virtual tokens before the text.
        demands: What the objective asks for; None for a mean over labels. A pair of rows is not divided.

    Example:
        >>> import torch
        >>> batches = batches_of(torch.ones(4, 3, dtype=torch.long), None, None, batches=2, micros=1, virtual=0)
        >>> [(len(micro.ids), micro.share) for (micro,) in batches]
        [(2, 0.5), (2, 0.5)]
    """
    if labels is None:
        labels = ids if mask is None else ids.masked_fill(mask == 0, IGNORED)
    demands = demands or Demands()
    _, padded_mask = behind(virtual, labels, mask)
    if virtual and demands.compares:
        labels, _ = behind(virtual + 1, labels[:, 1:], None)
    else:
        labels, _ = behind(virtual, labels, None)
    # Counted over the whole step, so that every token weighs the same, whatever the cut into batches.
    whole = demands.weight(labels)
    examples = len(ids) // demands.rows
    batches = min(batches, examples)
    # The same number in each batch: the trunk knows the last part of a step by the number of all parts.
    micros = min(micros, examples // batches)
    rows_of_batches = _split(ids, labels, padded_mask, batches, demands.rows)
    return [_micro_batches(*rows, micros, whole, demands) for rows in rows_of_batches]


def numbered(batches: Sequence[Sequence[MicroBatch]], examples: Sequence[int]) -> list[list[MicroBatch]]:
    """Returns a step's micro-batches with the numbers of their rows.

    Args:
        batches: Micro-batches of each batch, in the order of the rows.
        examples: Number of each row of the step within the client's data; empty if the numbers are not known.

    Example:
        >>> import torch
        >>> rows = torch.ones(3, 3, dtype=torch.long)
        >>> batches = batches_of(rows, None, None, batches=1, micros=2, virtual=0)
        >>> [micro.examples for micro in numbered(batches, [4, 0, 9])[0]]
        [(4, 0), (9,)]
    """
    left = iter(examples)
    with_numbers = []
    for parts in batches:
        numbered_parts = []
        for part in parts:
            of_part = tuple(itertools.islice(left, len(part.ids)))
            numbered_parts.append(replace(part, examples=of_part))
        with_numbers.append(numbered_parts)
    return with_numbers


def _micro_batches(
    ids: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    count: int,
    whole: int,
    demands: Demands,
) -> list[MicroBatch]:
    """Cuts a batch into micro-batches. Their losses are weighted by what they are means over; the step has `whole`."""
    count = min(max(1, count), len(ids) // demands.rows)
    return [
        MicroBatch(part_ids, part_labels, part_mask, demands.weight(part_labels) / whole)
        for part_ids, part_labels, part_mask in _split(ids, labels, mask, count, demands.rows)
    ]


def _split(
    ids: Tensor, labels: Tensor, mask: Tensor | None, count: int, together: int
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Cuts rows, with labels and mask, into parts of almost equal size. `together` rows each stay in one part."""
    examples = torch.arange(len(ids) // together)
    sizes = [len(part) * together for part in examples.tensor_split(count)]
    masks = [None] * count if mask is None else mask.split(sizes)
    return zip(ids.split(sizes), labels.split(sizes), masks, strict=True)
