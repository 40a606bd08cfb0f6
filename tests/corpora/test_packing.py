"""Sequences of a length: texts that are cut, padded or packed."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from test_formats import reading, said, table

from fedsplit.corpora.formats import read_rows
from fedsplit.corpora.packing import fit
from fedsplit.corpora.sequences import Row
from fedsplit.model.kernels import IGNORED


def test_texts_are_cut_and_what_predicts_nothing_is_left_out(tiny_models: dict[str, Path]) -> None:
    found = table(prompt=["1234", "1234567890", "1"], completion=["56789", "1", "2"])
    how = reading(tiny_models["gpt2"], "completion")
    fitted = fit(read_rows(found, how).rows, how, length=8)
    assert [(said(row.ids), said(row.labels)) for row in fitted.rows] == [("12345678", "____5678"), ("12|", "_2|")]
    assert (fitted.cut, fitted.dropped) == (2, 1)


TEXTS = st.lists(st.lists(st.tuples(st.integers(1, 50), st.booleans()), min_size=2, max_size=7), min_size=1, max_size=8)


@given(TEXTS)
def test_whole_texts_packed_predict_what_they_predict_alone(texts: list[list[tuple[int, bool]]]) -> None:
    rows = [Row([t for t, _ in text], [t if said else IGNORED for t, said in text], "ann") for text in texts]
    alone, packed = (fit(rows, reading(Path(), "chat", packing), 9) for packing in ("false", "true"))
    assert [t for row in packed.rows for t in row.ids] == [t for row in alone.rows for t in row.ids]
    assert all(len(row.ids) == len(row.labels) <= 9 for row in packed.rows)
    assert sum(row.predicted for row in packed.rows) == sum(row.predicted for row in alone.rows)
    assert packed.dropped == alone.dropped == sum(not row.predicted for row in rows)


def test_packed_text_is_one_stream_and_padded_text_is_not(tiny_models: dict[str, Path]) -> None:
    found = table(text=["abc", "defgh", "i"])
    packed, padded = (reading(tiny_models["gpt2"], "text", packing) for packing in ("auto", "false"))
    assert [said(row.ids) for row in fit(read_rows(found, packed).rows, packed, 4).rows] == ["abc|", "defg", "h|i|"]
    fitted = fit(read_rows(found, padded).rows, padded, 4)
    assert [said(row.ids) for row in fitted.rows] == ["abc|", "defg", "i|"] and fitted.cut == 1
