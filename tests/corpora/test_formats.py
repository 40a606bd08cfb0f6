"""Texts, completions and chats: what becomes of a row, and which of its tokens are predicted."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from fedsplit.corpora.data_table import Table
from fedsplit.corpora.formats import Reading, format_of, read_rows
from fedsplit.corpora.instructions import prompt_of
from fedsplit.corpora.packing import fit
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
        (("conversations", "id"), {}, "chat"),
        (("instruction", "output"), {}, "instruction"),
        (("instruction", "input", "output", "text"), {}, "instruction"),
        (("instruction", "output", "text"), {}, "text"),
        (("instruction", "context", "response"), {"input": "context", "output": "response"}, "instruction"),
        (("instruction", "output"), {"prompt": "instruction", "completion": "output"}, "completion"),
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
        ({"instruction": ["x"], "output": [None]}, "instruction", {}, "rows that all have a output .row 1 has no text"),
        (
            {"instruction": ["x"], "input": [7], "output": ["y"]},
            "instruction",
            {},
            "input is a text .row 1 has 7",
        ),
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
    with pytest.raises(
        SettingError, match=r"dataset: .*'text', 'messages', 'conversations', or .*its columns are body"
    ):
        format_of(table(body=["x"]), DataSettings())


def test_only_the_answer_to_an_instruction_is_predicted(tiny_models: dict[str, Path], talkative: Path) -> None:
    """Behind Alpaca's prompt, or as two turns by the chat template of a model that has one."""
    found = table(instruction=["add", "say"], input=["2,3", None], output=["5", "hi"])
    plain = read_rows(found, reading(tiny_models["gpt2"], "instruction")).rows
    prompts = [prompt_of("add", "2,3"), prompt_of("say", "")]
    assert [said(row.ids) for row in plain] == [
        f"{prompts[0]}5|".replace(" ", "|"),
        f"{prompts[1]}hi|".replace(" ", "|"),
    ]
    assert [said(row.labels).strip("_") for row in plain] == ["5|", "hi|"]
    chats = read_rows(found, reading(talkative, "instruction")).rows
    assert [said(row.ids) for row in chats] == ["<user>add\n\n2,3\n<assistant>5\n", "<user>say\n<assistant>hi\n"]
    assert [said(row.labels).strip("_") for row in chats] == ["5\n", "hi\n"]


def test_conversations_of_sharegpt_are_chats(talkative: Path) -> None:
    """The same tokens as of messages; speakers that no template knows are named with their row."""
    speakers = {"user": "human", "assistant": "gpt", "system": "system"}
    turns = [{"from": speakers[turn["role"]], "value": turn["content"]} for turn in CHAT]
    (row,) = read_rows(table(conversations=[turns]), reading(talkative, "chat")).rows
    (expected,) = read_rows(table(messages=[CHAT]), reading(talkative, "chat")).rows
    assert (row.ids, row.labels) == (expected.ids, expected.labels)
    odd = [*turns, {"from": "function_call", "value": "{}"}]
    with pytest.raises(SettingError, match=r"row 2.*speakers are human . gpt .*one is 'function_call'"):
        read_rows(table(conversations=[turns, odd]), reading(talkative, "chat"))


def test_a_pair_is_two_continuations_of_a_prompt(tiny_models: dict[str, Path]) -> None:
    found = table(q=["1+1=", "a"], yes=["2", "bc"], no=["34", ""], owner=["x", "y"])
    how = reading(tiny_models["gpt2"], "preference", prompt="q", chosen="yes", rejected="no")
    rows = read_rows(found, how).rows
    assert [(said(row.ids), said(row.labels), row.key, row.source) for row in rows] == [
        ("1+1=2|", "____2|", "x", 0),
        ("1+1=34|", "____34|", "x", 0),
        ("abc|", "_bc|", "y", 1),
        ("a|", "_|", "y", 1),
    ]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
@pytest.mark.parametrize("is_whole", [False, True])
def test_a_pair_of_chats_differs_in_the_last_answer(talkative: Path, template: str, is_whole: bool) -> None:
    """With a column of prompts, or with two whole chats; earlier answers are not predicted."""
    give_template(talkative, template)
    before, answer = CHAT[:-1], CHAT[-1:]
    other = [{"role": "assistant", "content": "because"}]
    columns = {"chosen": [[*before, *answer]], "rejected": [[*before, *other]]}
    if not is_whole:
        columns = {"prompt": [before], "chosen": [answer], "rejected": [other]}
    chosen, rejected = read_rows(table(**columns), reading(talkative, "preference")).rows
    prompt = "<system>be-brief\n<user>hi\n<assistant>yes\n<user>why?\n<assistant>"
    assert (said(chosen.ids), said(rejected.ids)) == (f"{prompt}no\n", f"{prompt}because\n")
    assert said(chosen.labels) == "_" * len(prompt) + "no\n"
    assert said(rejected.labels) == "_" * len(prompt) + "because\n"
    assert chosen.source == rejected.source == 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": CHAT, "rejected": CHAT}, "lists of messages, all three"),
        ({"prompt": CHAT[:2], "chosen": CHAT[2:3], "rejected": "no"}, "lists of messages, all three"),
        ({"chosen": CHAT[:3], "rejected": CHAT}, "differ in their last message alone"),
        ({"prompt": CHAT[:2], "chosen": CHAT[2:], "rejected": CHAT[2:]}, "differ in their last message alone"),
        ({"prompt": CHAT[:2], "chosen": [], "rejected": []}, "a chat in which the assistant says something"),
    ],
)
def test_chats_that_are_no_pair_are_refused(talkative: Path, row: dict[str, Any], message: str) -> None:
    columns = {name: [value] for name, value in row.items()}
    with pytest.raises(SettingError, match=rf"^dataset: notes.jsonl \(row 1\) is not .*{message}"):
        read_rows(table(**columns), reading(talkative, "preference"))


def test_pairs_of_chats_need_a_template(tiny_models: dict[str, Path]) -> None:
    found = table(chosen=[CHAT], rejected=[[*CHAT[:-1], {"role": "assistant", "content": "x"}]])
    with pytest.raises(
        SettingError, match=r"^model: .* chat template, which --data.format preference with lists of mess"
    ):
        read_rows(found, reading(tiny_models["gpt2"], "preference"))


def test_columns_of_pairs_are_found_before_those_of_completions(tiny_models: dict[str, Path]) -> None:
    pair = {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}
    assert format_of(table(**pair), DataSettings()) == "preference"
    assert format_of(table(**pair, completion=["d"]), DataSettings()) == "preference"
    assert format_of(table(**pair, messages=[CHAT]), DataSettings()) == "chat"
    with pytest.raises(SettingError, match="'prompt' and 'completion', or 'chosen' and 'rejected'"):
        format_of(table(chosen=["b"]), DataSettings())


def test_a_pair_is_left_out_whole(tiny_models: dict[str, Path]) -> None:
    """Where the cut leaves one of its texts nothing to predict."""
    found = table(prompt=["abcd", "ab", "abcdef"], chosen=["ef", "cd", "g"], rejected=["g", "e", "h"])
    how = reading(tiny_models["gpt2"], "preference")
    fitted = fit(read_rows(found, how).rows, how, length=5)
    assert [said(row.ids) for row in fitted.rows] == ["abcde", "abcdg", "abcd|", "abe|"]
    assert (fitted.cut, fitted.dropped) == (4, 2)
    rows = [row for row in read_rows(found, how).rows if said(row.ids) != "abe|"]
    assert [said(row.ids) for row in fit(rows, how, length=5).rows] == ["abcde", "abcdg"]


def test_pairs_are_tokens_as_trl_makes_them(tiny_models: dict[str, Path], talkative: Path) -> None:
    """Of texts and of chats, but for the token that ends a text, which the model names here."""
    data_utils = pytest.importorskip("trl.data_utils")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(talkative)
    prompt, answers = CHAT[:-1], (CHAT[-1:], [{"role": "assistant", "content": "because"}])
    row = {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
    written = data_utils.apply_chat_template(row, tokenizer)
    sequences = read_rows(
        table(**{name: [value] for name, value in row.items()}), reading(talkative, "preference")
    ).rows
    for name, sequence in zip(("chosen", "rejected"), sequences, strict=True):
        before, after = tokenizer(written["prompt"])["input_ids"], tokenizer(written[name])["input_ids"]
        assert list(sequence.ids) == [*before, *after]
        assert list(sequence.labels) == [IGNORED] * len(before) + after
