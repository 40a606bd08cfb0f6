"""Padded sequences: nothing is lost, and no more padding than a batch needs."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.corpora.sequences import Row, Sequences, predicted, stack
from fedsplit.model.kernels import IGNORED

ROWS = st.lists(st.lists(st.tuples(st.integers(1, 50), st.booleans()), min_size=2, max_size=9), min_size=1, max_size=6)


def make(texts: list[list[tuple[int, bool]]]) -> list[Row]:
    return [Row([t for t, _ in text], [t if said else IGNORED for t, said in text], "ann") for text in texts]


@given(ROWS, st.data())
def test_rows_come_out_as_they_went_in(texts: list[list[tuple[int, bool]]], data: st.DataObject) -> None:
    rows = make(texts)
    whole = stack(rows, pad=0)
    which = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1))
    chosen = whole[which]
    lengths = [len(rows[n].ids) for n in which]
    assert chosen.ids.shape == chosen.labels.shape == (len(which), max(lengths))
    assert (chosen.mask is None) == (min(lengths) == max(lengths))
    for n, ids, labels in zip(which, chosen.ids.tolist(), chosen.labels.tolist(), strict=True):
        size = len(rows[n].ids)
        assert ids[:size] == rows[n].ids and labels[:size] == rows[n].labels
        assert set(ids[size:]) <= {0} and set(labels[size:]) <= {IGNORED}
    if chosen.mask is not None:
        assert chosen.mask.sum(1).tolist() == lengths
    assert chosen.tokens == sum(lengths)
    assert chosen.predicted == predicted(chosen.labels) == sum(rows[n].predicted for n in which)


@given(ROWS, st.integers(1, 4))
def test_batches_are_all_rows_in_order(texts: list[list[tuple[int, bool]]], size: int) -> None:
    whole = stack(make(texts), pad=0)
    batches = whole.split(size)
    assert [len(batch) for batch in batches] == [size] * (len(whole) // size) + [len(whole) % size] * bool(
        len(whole) % size
    )
    assert sum(batch.tokens for batch in batches) == whole.tokens


def test_without_padding_labels_are_the_tokens_themselves() -> None:
    blocks = [[1, 2, 3], [4, 5, 6]]
    found = stack([Row(block, block, "ann") for block in blocks], pad=0)
    assert found.labels is found.ids and found.mask is None
    assert torch.equal(found.ids, Sequences.packed(torch.tensor(blocks)).ids)
    assert (found.tokens, found.predicted) == (6, 4)


def test_classes_stay_with_their_sequences() -> None:
    rows = [Row([1, 2, 3], [], "ann", target=2), Row([4], [], "ann", target=0)]
    whole = stack(rows, pad=9)
    assert whole.labels.tolist() == [2, 0] and whole.predicted == predicted(whole.labels) == 2
    one = whole[[1]]
    assert (one.ids.tolist(), one.labels.tolist(), one.mask, one.tokens) == ([[4]], [0], None, 1)
