"""Chains of codecs: what is one, and what is none."""

from __future__ import annotations

import pytest

from fedsplit.settings.chains import ChainLink, chain_forms, parse_chain
from fedsplit.settings.choices import CODECS


def test_a_chain_is_its_codecs_with_their_parameters() -> None:
    assert parse_chain("topk:0.1,int8,zstd") == (
        ChainLink("topk", 0.1, remembers=True),
        ChainLink("int8"),
        ChainLink("zstd", 3.0),
    )
    assert parse_chain("zstd:19") == (ChainLink("zstd", 19.0),)
    assert parse_chain("delta") == (ChainLink("delta", 0.0, remembers=True),)


def test_only_the_first_codec_with_a_memory_remembers() -> None:
    links = parse_chain("delta:0.02,topk:0.1,lowrank:4") or ()
    assert [link.remembers for link in links] == [True, False, False]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "zip",
        "raw,bf16",
        "int8,topk:0.1",
        "zstd,int8",
        "int8,",
        "int8,int8",
        "topk:0.1,topk:0.2",
        "topk:0.1,delta",
        "topk",
        "topk:",
        "topk:0",
        "topk:1.1",
        "topk:nan",
        "topk:x",
        "lowrank:2.5",
        "lowrank:0",
        "zstd:20",
        "int8:4",
        " int8",
    ],
)
def test_what_cannot_work_together_is_no_chain(text: str) -> None:
    assert parse_chain(text) is None


def test_the_words_name_every_codec() -> None:
    words = chain_forms()
    assert all(name in words for name in CODECS)
    assert "zstd[:LEVEL]" in words and "topk:SHARE" in words
