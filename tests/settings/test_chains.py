"""Chains of codecs: what is one, and what is none."""

from __future__ import annotations

import pytest

from fedsplit.errors import SettingError
from fedsplit.settings.chains import ChainLink, chain_forms, chain_problem, parse_chain
from fedsplit.settings.choices import CODECS
from fedsplit.settings.documents import build


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
        "top k:0.1",
    ],
)
def test_what_cannot_work_together_is_no_chain(text: str) -> None:
    assert parse_chain(text) is None


def test_spaces_around_a_codec_do_not_count() -> None:
    assert parse_chain(" topk:0.1 , int8,zstd ") == parse_chain("topk:0.1,int8,zstd")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int8,zstd:23", "in place of zstd:23, zstd[:LEVEL] with a whole LEVEL from 1 to 19"),
        ("delta:-1", "in place of delta:-1, delta[:THRESHOLD] with a THRESHOLD from 0 to 1"),
        ("lowrank:2.5,int8", "in place of lowrank:2.5, lowrank:RANK with a whole RANK from 1 to 1024"),
        ("topk", "in place of topk, topk:SHARE with a SHARE from 0.0001 to 1"),
        ("topk:0.1,int4:3", "in place of int4:3, int4, which takes no parameter"),
        ("zip", chain_forms()),
        ("zstd,int8", chain_forms()),
    ],
)
def test_a_wrong_parameter_is_named_with_its_range(text: str, words: str) -> None:
    assert chain_problem(text) == words


@pytest.mark.parametrize("setting", ["wire.codec", "wire.gradient_up", "adapter.codec"])
def test_every_codec_setting_names_a_wrong_parameter(setting: str) -> None:
    with pytest.raises(SettingError, match="allowed: in place of topk:2, topk:SHARE with"):
        build({setting: "topk:2,int8"})
    assert build({setting: "mxfp4 , zstd"}) == build({setting: "mxfp4,zstd"})
    with pytest.raises(SettingError, match="without delta"):
        build({"adapter.codec": " delta"})


def test_the_words_name_every_codec() -> None:
    words = chain_forms()
    assert all(name in words for name in CODECS)
    assert "zstd[:LEVEL]" in words and "topk:SHARE" in words
