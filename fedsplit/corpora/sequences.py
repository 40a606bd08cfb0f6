"""Sequences of tokens with what is to be predicted of them, padded where they differ in length.

What is predicted is the next token, or under classification the class of a sequence.

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
    """One sequence, before there are tensors.

    Attributes:
        ids: Its tokens.
        labels: The tokens that are predicted, `IGNORED` elsewhere.
        key: What it is dealt by: its owner, or another column's value.
        target: Its class, where that alone is predicted.
        share: What it counts as where shares are told; its key where nothing is said.
        source: Number of the table's row that it is of, from 0. Of packed texts, that of the first one; below 0 in a
            packed stream. Neighbours of one source stay together.
    """

    ids: Sequence[int]
    labels: Sequence[int]
    key: str
    target: int | None = None
    share: str = ""
    source: int = -1

    @property
    def predicted(self) -> int:
        """How many tokens are predicted; the first one never is. A class counts as one."""
        if self.target is not None:
            return 1
        return sum(label != IGNORED for label in self.labels[1:])


def predicted(labels: Tensor) -> int:
    """How many tokens of labels (B, T) are predicted: not the first one of a sequence. Of classes (B,), all are."""
    if labels.ndim == 1:
        return len(labels)
    return int((labels[:, 1:] != IGNORED).sum())


@dataclass(frozen=True)
class Sequences:
    """Some sequences, which lie at the left; what is right of their ends is padding.

    Attributes:
        ids: Tokens (n, T).
        labels: The tokens themselves (n, T) where they are predicted, `IGNORED` elsewhere; as the library takes them,
            they are not shifted. Or the classes of the sequences (n,).
        lengths: Tokens of each sequence (n,); None where there is no padding.
    """

    ids: Tensor
    labels: Tensor
    lengths: Tensor | None = None

    @classmethod
    def packed(cls, ids: Tensor) -> Sequences:
        """Tokens (n, T) that are all predicted, without padding."""
        return cls(ids, ids)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, which: Sequence[int] | slice) -> Sequences:
        """Some of them, without the padding that all of these have in common."""
        ids, labels = self.ids[which], self.labels[which]
        if self.lengths is None:
            return Sequences(ids, labels)
        lengths = self.lengths[which]
        longest = int(lengths.max()) if len(lengths) else 0
        padded = bool((lengths < longest).any())
        labels = labels if labels.ndim == 1 else labels[:, :longest]
        return Sequences(ids[:, :longest], labels, lengths if padded else None)

    def split(self, size: int) -> list[Sequences]:
        """Batches in order, of so many sequences each but for the last."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    def to(self, device: torch.device) -> Sequences:
        """The same on a device."""
        lengths = None if self.lengths is None else self.lengths.to(device)
        return Sequences(self.ids.to(device), self.labels.to(device), lengths)

    @property
    def mask(self) -> Tensor | None:
        """(n, T), False on padding; None where there is none."""
        if self.lengths is None:
            return None
        return torch.arange(self.ids.shape[1], device=self.ids.device)[None] < self.lengths[:, None]

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return self.ids.numel() if self.lengths is None else int(self.lengths.sum())

    @property
    def predicted(self) -> int:
        """Tokens, or classes, that are predicted."""
        return predicted(self.labels)


def stack(rows: Sequence[Row], pad: int) -> Sequences:
    """Rows as tensors.

    Args:
        rows: One or more.
        pad: The token put where a sequence is shorter than the longest; nobody sees or predicts it.
    """
    lengths = torch.tensor([len(row.ids) for row in rows])
    longest = int(lengths.max())
    ids = torch.tensor([[*row.ids, *[pad] * (longest - len(row.ids))] for row in rows])
    if all(row.labels is row.ids and row.target is None for row in rows) and bool((lengths == longest).all()):
        return Sequences.packed(ids)
    if rows[0].target is not None:
        classes = torch.tensor([row.target for row in rows])
        return Sequences(ids, classes, lengths if bool((lengths < longest).any()) else None)
    labels = torch.tensor([[*row.labels, *[IGNORED] * (longest - len(row.labels))] for row in rows])
    return Sequences(ids, labels, lengths if bool((lengths < longest).any()) else None)


def behind(virtual: int, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Labels and mask (B, T) of a text that virtual tokens are put before, as (B, P + T).

    Args:
        virtual: P, how many; of these only the last one predicts.
        labels: What is predicted of the text.
        mask: 0 on padding; None where there is none.
    """
    if not virtual:
        return labels, mask
    padded = None if mask is None else functional.pad(mask, (virtual, 0), value=1)
    return functional.pad(labels, (virtual, 0), value=IGNORED), padded
