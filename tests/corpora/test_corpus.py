"""Texts are read whole, and become blocks without loss but for the end."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from fedsplit.corpora.corpus import FIRST_CLIENT_YEAR, chop, pack, sotu
from fedsplit.corpora.tables import read_table
from fedsplit.model.vocabulary import open_tokenizer
from fedsplit.settings.config import BUNDLED_MODEL
from fedsplit.settings.sections import DataSettings


@given(st.lists(st.lists(st.integers(1, 50)), max_size=8), st.integers(1, 9))
def test_blocks_joined_are_the_texts_with_ends_between(texts: list[list[int]], length: int) -> None:
    blocks = pack(texts, length, end=0)
    stream = [token for text in texts for token in (*text, 0)]
    assert all(len(block) == length for block in blocks)
    assert [token for block in blocks for token in block] == stream[: len(stream) // length * length]
    assert blocks == chop([[*text, 0] for text in texts], length)


def test_clients_and_base_model_share_no_address() -> None:
    """The base model's own record of what it read, against what clients are given."""
    record = json.loads(Path("experiments/base_model/result.json").read_text())
    read = {*record["trained_on"], *record["validated_on"]}
    given_to_clients = {document.name for document in sotu(first_year=FIRST_CLIENT_YEAR)}
    assert read == {document.name for document in sotu(last_year=1945)}
    assert not read & given_to_clients
    assert len(read) + len(given_to_clients) == len(sotu())
    assert len(given_to_clients) == len(read_table("sotu", DataSettings()))


def test_addresses_come_by_date_with_their_presidents() -> None:
    documents = sotu(first_year=1961, last_year=1963)
    assert [document.name for document in documents] == [
        "1961-Eisenhower-1",
        "1961-Kennedy-1",
        "1962-Kennedy-1",
        "1963-Kennedy-1",
    ] or {document.owner for document in documents} == {"Dwight D. Eisenhower", "John F. Kennedy"}
    assert all(len(document.text) > 1000 for document in documents)


def test_tokens_decode_to_the_text() -> None:
    from tokenizers import Tokenizer

    (document,) = sotu(1790, 1790)[:1]
    (ids,) = open_tokenizer(BUNDLED_MODEL).encode([document.text])
    assert Tokenizer.from_file(str(BUNDLED_MODEL / "tokenizer.json")).decode(ids) == document.text
