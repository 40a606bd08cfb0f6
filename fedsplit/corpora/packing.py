"""Cuts sequences to a length, or packs several texts into one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedsplit.corpora.corpus import chop
from fedsplit.corpora.formats import Reading
from fedsplit.corpora.sequences import Row
from fedsplit.model.kernels import IGNORED
from fedsplit.settings.choices import PAIRS


@dataclass(frozen=True)
class Fitted:
    """Sequences of a limited length.

    Attributes:
        rows: The sequences.
        cut: Number of texts that were too long, and lost their end.
        dropped: Number of texts with nothing left to predict after the cut, which are left out.
    """

    rows: list[Row]
    cut: int = 0
    dropped: int = 0


def joined(parts: Sequence[Fitted]) -> Fitted:
    """Joins several results: all sequences, and the sums of the counts."""
    return Fitted(
        rows=[row for part in parts for row in part.rows],
        cut=sum(part.cut for part in parts),
        dropped=sum(part.dropped for part in parts),
    )


def fit(rows: Sequence[Row], reading: Reading, length: int) -> Fitted:
    """Cuts or packs texts of one owner into sequences of at most `length` tokens.

    Packed text is one stream, cut into full sequences: nothing is padded, and the incomplete last sequence is dropped.
    Packed texts of further formats are put into a sequence whole, as long as there is room. A token attends to all
    earlier tokens of the sequence, even to tokens of earlier texts.

    Args:
        rows: The texts.
        reading: The way to read the table, with the setting `data.packing`.
        length: Largest number of tokens in a sequence.

    Example:
        >>> from pathlib import Path
        >>> from fedsplit.settings.sections import DataSettings
        >>> reading = Reading(DataSettings(), "text", "", Path(), end=0)
        >>> texts = [Row([1, 2, 0], [1, 2, 0], "ann"), Row([3, 4, 0], [3, 4, 0], "ann")]
        >>> [row.ids for row in fit(texts, reading, length=2).rows]
        [[1, 2], [0, 3], [4, 0]]
    """
    if reading.packs and reading.format == "text":
        blocks = chop([row.ids for row in rows], length)
        return Fitted([Row(block, block, rows[0].key) for block in blocks])

    shortened = [_shortened(row, length, reading.pad) for row in rows]
    useful = [row for row in shortened if row.ids and row.predicted]
    if reading.format == PAIRS:  # a text alone is compared with nothing
        useful = [row for pair in by_source(useful) if len(pair) == 2 for row in pair]
    return Fitted(
        rows=_packed(useful, length) if reading.packs else useful,
        cut=sum(len(row.ids) > length for row in rows),
        dropped=len(shortened) - len(useful),
    )


def _shortened(row: Row, length: int, pad: int) -> Row:
    """Cuts a text to a length. A classified text also loses padding tokens at its end."""
    end = min(len(row.ids), length)
    if row.target is not None:
        # transformers takes the class from the last token that is no padding token.
        while end and row.ids[end - 1] == pad:
            end -= 1
    if len(row.ids) == end:
        return row
    ids = row.ids[:end]
    labels = ids if row.labels is row.ids else row.labels[:end]  # `stack` stores equal ids and labels once
    return replace(row, ids=ids, labels=labels)


def by_source(rows: Sequence[Row]) -> list[list[Row]]:
    """Groups consecutive sequences that come from one row of the table, such as the turns of a chat.

    Example:
        >>> rows = [Row([1], [1], "ann", source=number) for number in (0, 0, 1)]
        >>> [len(group) for group in by_source(rows)]
        [2, 1]
    """
    groups: list[list[Row]] = []
    for row in rows:
        last_source = groups[-1][0].source if groups else -1
        if row.source >= 0 and row.source == last_source:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _packed(rows: Sequence[Row], length: int) -> list[Row]:
    """Packs whole texts, in their order, into sequences of at most `length` tokens.

    A chat of several sequences follows earlier texts only if the whole chat fits there. Otherwise the chat begins a new
    sequence. So two packed sequences share a chat only if both begin with the chat, and have its number as source.
    """
    packed: list[Row] = []
    for text in by_source(rows):
        tokens = sum(len(row.ids) for row in text)
        fits_behind = bool(packed) and len(packed[-1].ids) + tokens <= length
        # The last sequence is taken out, since the text may be appended to it.
        current = [packed.pop()] if fits_behind else []
        for row in text:
            if current and len(current[-1].ids) + len(row.ids) <= length:
                current[-1] = _appended(current[-1], row)
            else:
                current.append(row)
        packed += current
    return packed


def _appended(before: Row, row: Row) -> Row:
    """Joins two texts. The first token of the second text is not predicted, as in a sequence without earlier texts."""
    ids = [*before.ids, *row.ids]
    labels = [*before.labels, IGNORED, *row.labels[1:]]
    return replace(before, ids=ids, labels=labels)
