"""Texts, completions and chats: what becomes of a row, and which of its tokens are predicted."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.corpora.formats import Reading, fit, format_of, read_rows
from fedsplit.corpora.sequences import Row
from fedsplit.corpora.tables import Table
from fedsplit.errors import SettingError
from fedsplit.model.kernels import IGNORED
from fedsplit.settings.sections import DataSettings

PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}\n"
    "{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
)
CHAT = [
    {"role": "system", "content": "be-brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "why?"},
    {"role": "assistant", "content": "no"},
]


def table(**columns: list[Any]) -> Table:
    return Table("notes.jsonl", "notes", columns)


def reading(path: Path, format: str, packing: str = "auto", column: str = "", **names: str) -> Reading:
    return Reading(DataSettings(packing=packing, **names), format, column, path, end=0)


def said(ids: Any) -> str:
    """Characters of tokens, as tests' tokenizer has them; _ where nothing is predicted, | for the end token."""
    shown = {IGNORED: "_", 0: "|", 96: "\n"}
    return "".join(shown.get(token) or chr(32 + token) for token in ids)


@pytest.fixture
def talkative(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    """A tiny model whose tokenizer has a chat template, which a test may replace."""
    shutil.copytree(tiny_models["llama"], tmp_path / "model")
    give_template(tmp_path / "model", PLAIN)
    return tmp_path / "model"


def give_template(folder: Path, template: str) -> None:
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))


def test_text_is_predicted_whole_and_empty_text_left_out(tiny_models: dict[str, Path]) -> None:
    texts = table(text=["ab", " ", None, "c"], owner=["x", "y", "y", "z"])
    found = read_rows(texts, reading(tiny_models["gpt2"], "text"))
    assert [(said(row.ids), said(row.labels), row.key, row.source) for row in found.rows] == [
        ("ab|", "ab|", "x", 0),
        ("c|", "c|", "z", 3),
    ]
    assert found.empty == 2


def test_a_text_with_a_class_has_no_end_token_and_ends_in_no_padding(tiny_models: dict[str, Path]) -> None:
    """Token 0, a space in tests' tokenizer, is the padding: the library would not take it for the last one."""
    found = table(text=["ab", "abc  d", " "], label=["bad", "good", "bad"])
    how = replace(reading(tiny_models["gpt2"], "classification"), classes=("bad", "good"))
    rows = fit(read_rows(found, how).rows, how, length=5).rows
    assert [(list(row.ids), row.target, row.share) for row in rows] == [([65, 66], 0, "bad"), ([65, 66, 67], 1, "good")]
    assert [row.predicted for row in rows] == [1, 1]


def test_only_completions_are_predicted(tiny_models: dict[str, Path]) -> None:
    found = table(q=["1+1=", "a"], a=["2", "bc"])
    rows = read_rows(found, reading(tiny_models["gpt2"], "completion", prompt="q", completion="a")).rows
    assert [(said(row.ids), said(row.labels)) for row in rows] == [("1+1=2|", "____2|"), ("abc|", "_bc|")]
    assert {row.key for row in rows} == {"notes"}


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_only_the_assistant_is_predicted(talkative: Path, template: str) -> None:
    """By the template's own marks, and by what a turn adds to the turns before: the same tokens."""
    give_template(talkative, template)
    (row,) = read_rows(table(messages=[CHAT]), reading(talkative, "chat")).rows
    assert said(row.ids) == "<system>be-brief\n<user>hi\n<assistant>yes\n<user>why?\n<assistant>no\n"
    assert (
        said(row.labels)
        == "_" * len("<system>be-brief\n<user>hi\n<assistant>")
        + "yes\n"
        + "_" * len("<user>why?\n<assistant>")
        + "no\n"
    )


@pytest.mark.parametrize(
    ("template", "chat", "words"),
    [
        (PLAIN, [], "a list of messages with role and content"),
        (PLAIN, "hello", "a list of messages with role and content"),
        (PLAIN, [{"role": "user"}], "whose role and content are texts"),
        (PLAIN, [{"role": "user", "content": "hi"}], "in which the assistant says something"),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + PLAIN,
            CHAT,
            r"that the template takes .no system here",
        ),
        ("{{ messages | length }}{{ messages[-1].content }}", CHAT, "begins a turn of the assistant's as it"),
    ],
)
def test_chats_that_cannot_be_told_apart_are_named(talkative: Path, template: str, chat: Any, words: str) -> None:
    give_template(talkative, template)
    with pytest.raises(SettingError, match=f"dataset: notes.jsonl .row 2. is not possible; allowed: .*{words}"):
        read_rows(table(messages=[[{"role": "assistant", "content": "a"}], chat]), reading(talkative, "chat"))


def test_a_model_without_a_template_is_refused(tiny_models: dict[str, Path]) -> None:
    with pytest.raises(SettingError, match=r"model: .* is not possible; allowed: a model whose tokenizer has a chat"):
        read_rows(table(messages=[CHAT]), reading(tiny_models["llama"], "chat"))


@pytest.mark.parametrize(
    ("columns", "settings", "format"),
    [
        (("text", "messages", "label"), {}, "text"),
        (("messages", "prompt"), {}, "chat"),
        (("prompt", "completion"), {}, "completion"),
        (("body",), {"text": "body"}, "text"),
        (("text", "prompt", "completion"), {"format": "completion"}, "completion"),
    ],
)
def test_the_columns_say_what_a_row_is(columns: tuple[str, ...], settings: dict[str, str], format: str) -> None:
    assert format_of(table(**{name: ["x"] for name in columns}), DataSettings(**settings)) == format


@pytest.mark.parametrize(
    ("columns", "format", "settings", "message"),
    [
        ({"body": ["x"]}, "text", {}, "data.text: text is not possible; allowed: a column of notes.jsonl: body"),
        ({"text": ["x"]}, "chat", {"messages": "m"}, "data.messages: m is not possible; allowed: a column of"),
        ({"prompt": ["x"]}, "completion", {}, "data.completion: completion is not possible; allowed: a column of"),
        ({"text": ["x"]}, "text", {"owner": "user"}, "data.owner: user is not possible; allowed: a column of"),
        ({"text": ["x"]}, "text", {"column": "topic"}, "partition: topic is not possible; allowed: a column of"),
        ({"text": ["x", "y"], "owner": ["ann", None]}, "text", {}, "dataset: notes.jsonl .*row 2 has no owner"),
        ({"prompt": ["x"], "completion": [None]}, "completion", {}, "dataset: .*row 1 has no text"),
        ({"text": [" ", None]}, "text", {}, "dataset: notes.jsonl is not possible; allowed: .* at least one text"),
        ({"text": ["x", 7]}, "text", {}, "dataset: notes.jsonl .*rows whose text is a text .row 2 has 7"),
        ({"text": ["x", date(2021, 3, 4)]}, "text", {}, "dataset: .*row 2 has 2021-03-04"),
        ({"text": [["x"] * 99]}, "text", {}, r"dataset: .*row 1 has \['x', .{30,40}…"),
        ({"text": ["x\ud83d"]}, "text", {}, "dataset: .*row 1 has half a character"),
        ({"prompt": ["x"], "completion": [7]}, "completion", {}, "rows whose completion is a text .row 1 has 7"),
        ({"text": ["x"], "label": [0]}, "classification", {"text": "label"}, "rows whose label is a text .row 1 has 0"),
    ],
)
def test_what_is_missing_is_named(
    columns: dict[str, Any], format: str, settings: dict[str, str], message: str, tiny_models: dict[str, Path]
) -> None:
    with pytest.raises(SettingError, match=message) as caught:
        read_rows(table(**columns), reading(tiny_models["gpt2"], format, **settings))
    assert "\n" not in str(caught.value)


def test_a_table_of_nothing_known_is_refused() -> None:
    with pytest.raises(SettingError, match=r"dataset: notes.jsonl .*'text', 'messages', or .*its columns are body"):
        format_of(table(body=["x"]), DataSettings())


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
