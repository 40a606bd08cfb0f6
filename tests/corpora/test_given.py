"""Data sets as Python objects."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st

from fedsplit.corpora.given import as_dataset
from fedsplit.errors import SettingError

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@drawn(st.dictionaries(TEXTS, st.lists(TEXTS, max_size=3), min_size=1, max_size=4))
def test_texts_by_client_keep_their_order_and_their_owner(texts: dict[str, list[str]]) -> None:
    expected = [(client, text) for client, of_client in texts.items() for text in of_client]
    if not expected:
        with pytest.raises(SettingError, match=r"^dataset: a dict without a text is not possible"):
            as_dataset(texts)
        return
    rows = as_dataset(texts)
    assert list(zip(rows["owner"], rows["text"], strict=True)) == expected


def test_rows_may_lack_columns() -> None:
    rows = as_dataset([{"prompt": "1 +", "completion": " 1"}, {"prompt": "2 +", "extra": 3}])
    assert rows.to_dict() == {"prompt": ["1 +", "2 +"], "completion": [" 1", None], "extra": [None, 3]}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "a list without a row"),
        (["a text"], "'a text' as row 0"),
        ([{"text": "a"}, {1: "b"}], "an object of type dict as row 1"),
        ([{"text": "a"}, {"text": 1}], "a list of dicts"),
        ({"ann": "a text"}, "'a text' for the client 'ann'"),
        ({"ann": ["a", 1]}, "an object of type list for the client 'ann'"),
        ("a text", "'a text'"),
        (None, "None"),
    ],
    ids=str,
)
def test_other_objects_are_refused_in_one_line(given: Any, words: str) -> None:
    with pytest.raises(SettingError) as refused:
        as_dataset(given)
    assert str(refused.value).startswith(f"dataset: {words} is not possible; allowed: a datasets.Dataset or ")
    assert "\n" not in str(refused.value)


def test_a_transform_is_refused_since_no_file_could_hold_it() -> None:
    rows = datasets.Dataset.from_dict({"text": ["a"]}).with_transform(lambda batch: batch)
    with pytest.raises(SettingError, match=r"map\(\) applies a transform for good"):
        as_dataset(rows)
