"""Sequences of tokens and their labels, padded to a common length.

Labels are the next tokens to predict or, under classification, the class of each sequence.

Shapes: n or B sequences of at most T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fedsplit.model.kernels import IGNORED


@dataclass(frozen=True)
class Row:
    """A sequence as plain lists, before `stack` joins rows as tensors.

    Attributes:
        ids: Token ids.
        labels: Token ids that are predicted, `IGNORED` elsewhere.
        key: Value that the data set is partitioned by: the owner, or a column's value.
        target: Number of the class, under classification; None otherwise.
        share: Group name used in the data summary. Defaults to `key`.
        source: Number of the table's row that the sequence comes from, counted from 0. For packed texts: row of the
            first text; below 0 in a packed stream. Consecutive sequences of one source stay together.
    """

    ids: Sequence[int]
    labels: Sequence[int]
    key: str
    target: int | None = None
    share: str = ""
    source: int = -1

    @property
    def predicted(self) -> int:
        """Number of predicted tokens. Nothing predicts the first token, and a class counts as one token."""
        if self.target is not None:
            return 1
        return sum(label != IGNORED for label in self.labels[1:])


def predicted(labels: Tensor) -> int:
    """Returns the number of predictions that labels ask for.

    Args:
        labels: Classes (B,), or token labels (B, T). The first column of token labels is never predicted.

    Example:
        >>> predicted(torch.tensor([[5, 6, 7], [5, 6, IGNORED]]))
        3
    """
    if labels.ndim == 1:
        return len(labels)
    return int((labels[:, 1:] != IGNORED).sum())


@dataclass(frozen=True)
class Sequences:
    """A batch of sequences, padded on the right.

    Attributes:
        ids: Token ids (n, T).
        labels: Predicted token ids (n, T), `IGNORED` elsewhere. They are not shifted, as transformers expects labels.
            Under classification: the class of each sequence (n,).
        lengths: Length of each sequence (n,); None if there is no padding.

    Example:
        >>> batch = stack([Row([1, 2, 3], [1, 2, 3], "ann"), Row([4, 5], [4, 5], "ann")], pad=0)
        >>> batch.ids.tolist()
        [[1, 2, 3], [4, 5, 0]]
        >>> batch.mask.tolist()
        [[True, True, True], [True, True, False]]
        >>> batch.tokens, batch.predicted
        (5, 3)
    """

    ids: Tensor
    labels: Tensor
    lengths: Tensor | None = None

    @classmethod
    def packed(cls, ids: Tensor) -> Sequences:
        """Returns sequences without padding, in which every token is predicted.

        Args:
            ids: Token ids (n, T).
        """
        return cls(ids, ids)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, which: Sequence[int] | slice) -> Sequences:
        """Returns some of the sequences, without the padding that all selected sequences share."""
        ids = self.ids[which]
        labels = self.labels[which]
        if self.lengths is None:
            return Sequences(ids, labels)
        lengths = self.lengths[which]
        # Cut to the longest of the selection: padding costs as much to compute as text.
        longest = int(lengths.max()) if len(lengths) else 0
        padded = bool((lengths < longest).any())
        labels = labels if labels.ndim == 1 else labels[:, :longest]
        return Sequences(ids[:, :longest], labels, lengths if padded else None)

    def split(self, size: int) -> list[Sequences]:
        """Returns batches of `size` sequences, in order. The last batch may be smaller."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    def to(self, device: torch.device) -> Sequences:
        """Returns the sequences on a device."""
        lengths = None if self.lengths is None else self.lengths.to(device)
        return Sequences(self.ids.to(device), self.labels.to(device), lengths)

    @property
    def mask(self) -> Tensor | None:
        """Mask (n, T), False on padding; None if there is no padding."""
        if self.lengths is None:
            return None
        positions = torch.arange(self.ids.shape[1], device=self.ids.device)
        return positions[None] < self.lengths[:, None]

    @property
    def tokens(self) -> int:
        """Number of tokens, padding excluded."""
        return self.ids.numel() if self.lengths is None else int(self.lengths.sum())

    @property
    def predicted(self) -> int:
        """Number of tokens, or classes, that are predicted."""
        return predicted(self.labels)


def stack(rows: Sequence[Row], pad: int) -> Sequences:
    """Pads rows to the longest and returns them as tensors.

    Args:
        rows: One row or more.
        pad: Token id of the padding. No token attends to padding, and no label asks for padding.
    """
    lengths = torch.tensor([len(row.ids) for row in rows])
    longest = int(lengths.max())
    is_padded = bool((lengths < longest).any())
    ids = torch.tensor([_padded(row.ids, longest, pad) for row in rows])

    # Labels equal to the tokens are stored once: half of the memory of a client's data.
    predicts_all = all(row.labels is row.ids and row.target is None for row in rows)
    if predicts_all and not is_padded:
        return Sequences.packed(ids)

    if rows[0].target is not None:
        labels = torch.tensor([row.target for row in rows])
    else:
        labels = torch.tensor([_padded(row.labels, longest, IGNORED) for row in rows])
    return Sequences(ids, labels, lengths if is_padded else None)


def _padded(tokens: Sequence[int], length: int, pad: int) -> list[int]:
    return [*tokens, *[pad] * (length - len(tokens))]


def behind(virtual: int, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Returns labels and mask (B, P + T) of text (B, T) that follows P virtual tokens.

    Only the last virtual token predicts: the first token of the text.

    Args:
        virtual: P, the number of virtual tokens.
        labels: Labels of the text.
        mask: Mask of the text, 0 on padding; None if there is no padding.

    Example:
        >>> labels, mask = behind(2, torch.tensor([[5, 6]]), None)
        >>> labels.tolist()
        [[-100, -100, 5, 6]]
    """
    if not virtual:
        return labels, mask
    padded = None if mask is None else functional.pad(mask, (virtual, 0), value=1)
    return functional.pad(labels, (virtual, 0), value=IGNORED), padded
