"""Chats: predicted, decoded, is exactly what the assistant says, under templates of the shapes that are in use."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import chat_templates
import pytest
from family_tokenizers import write_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from fedsplit.commands import generation_job
from fedsplit.corpora.chats import Chat, check_chat, read_chat
from fedsplit.model.kernels import IGNORED
from fedsplit.model.vocabulary import TextTokenizer, open_tokenizer


def messages(*said: str, first: str = "user") -> Chat:
    """A chat of two who speak in turn."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[number % 2], "content": words} for number, words in enumerate(said)]


PLAIN = messages("hello to the others", "yes or no", "a question", "the peace")
THOUGHT = messages(
    "hello to the others",
    "<think>\nits answer\n</think>\n\nyes or no",
    "a question",
    "<think>\nthe world\n</think>\n\nthe peace",
)
BEGUN = messages("a", "hello to the others", "yes or no", first="assistant")
"""The assistant speaks first, and its turn is one token."""


@pytest.fixture
def opened(tmp_path: Path) -> Any:
    def make(kind: str, template: str) -> TextTokenizer:
        write_tokenizer(tmp_path / "model", kind, getattr(chat_templates, template, template))
        return open_tokenizer(tmp_path / "model")

    return make


def parts(ids: list[int], labels: list[int]) -> list[tuple[bool, list[int]]]:
    """What is predicted and what is not, piece by piece; a label is the token itself."""
    pairs = list(zip(ids, labels, strict=True))
    assert all(label in (token, IGNORED) for token, label in pairs)
    return [(said, [token for token, _ in group]) for said, group in groupby(pairs, lambda pair: pair[1] != IGNORED)]


def predicted(tokenizer: TextTokenizer, chat: Chat) -> list[list[str]]:
    """What is predicted of each sequence of a chat, decoded."""
    decode = tokenizer.library.decode
    return [
        [decode(tokens) for said, tokens in parts(ids, labels) if said] for ids, labels in read_chat(tokenizer, chat)
    ]


@pytest.mark.parametrize(
    ("kind", "template", "end"),
    [
        ("qwen", "CHATML", "<|im_end|>"),
        ("qwen", "MARKED", "<|im_end|>"),
        ("llama3", "LLAMA3", "<|eot_id|>"),
        ("gemma", "GEMMA", "<end_of_turn>"),
        ("mistral", "MISTRAL", "</s>"),
        ("phi3", "PHI3", "<|end|>"),
        ("gpt2", "CHATML", "<|im_end|>\n"),  # no token of this tokenizer: the line break belongs to the end
    ],
)
def test_words_and_end_tokens_are_predicted(kind: str, template: str, end: str, opened: Any) -> None:
    """A chat stays one sequence, whose tokens are those of the template, and whose beginning is what generate reads."""
    tokenizer = opened(kind, template)
    ((ids, labels),) = read_chat(tokenizer, PLAIN)
    (found,) = predicted(tokenizer, PLAIN)
    assert [words.removeprefix(" ") for words in found] == [f"yes or no{end}", f"the peace{end}"]
    assert ids == tokenizer.library.apply_chat_template(PLAIN)["input_ids"]
    (prompt,) = generation_job.tokenise(tokenizer.library, [PLAIN[0]["content"]], True, "")
    (unasked, before), *_ = parts(ids, labels)
    assert not unasked and before == prompt
    if tokenizer.beginning and kind != "phi3":
        assert ids[: len(tokenizer.beginning)] == tokenizer.beginning != ids[1:2]


@pytest.mark.parametrize(
    ("kind", "template", "end"),
    [
        ("qwen", "CHATML", "<|im_end|>"),
        ("qwen", "MARKED", "<|im_end|>"),
        ("llama3", "LLAMA3", "<|eot_id|>"),
        ("mistral", "MISTRAL", "</s>"),
        ("phi3", "PHI3", "<|end|>"),
    ],
)
def test_an_assistant_who_speaks_first_is_predicted_without_its_header(
    kind: str, template: str, end: str, opened: Any
) -> None:
    tokenizer = opened(kind, template)
    (found,) = predicted(tokenizer, BEGUN)
    assert [words.strip() for words in found] == [f"a{end}", f"yes or no{end}"]


def test_the_header_of_a_template_that_never_asks_is_not_predicted(opened: Any) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    tokenizer = opened("qwen", template)
    assert predicted(tokenizer, PLAIN) == [["yes or no<|im_end|>", "the peace<|im_end|>"]]


@pytest.mark.parametrize("template", ["QWEN3", "MARKED_QWEN3"])
@pytest.mark.parametrize("thought", [True, False])
def test_a_template_that_writes_earlier_turns_anew_is_trained_turn_by_turn(
    template: str, thought: bool, opened: Any
) -> None:
    """Each turn behind the prompt that the model reads when it writes that turn, and nothing else of it predicted."""
    tokenizer, chat = opened("qwen", template), THOUGHT if thought else PLAIN
    found = read_chat(tokenizer, chat)
    thoughts = ["its answer", "the world"] if thought else ["", ""]
    said = zip(thoughts, ["yes or no", "the peace"], strict=True)
    words = [f"<think>\n{thought}\n</think>\n\n{answer}<|im_end|>" for thought, answer in said]
    assert predicted(tokenizer, chat) == [[words[0]], [words[1]]]
    for (ids, labels), turn in zip(found, (1, 3), strict=True):
        (_, before), *_ = parts(ids, labels)
        read = tokenizer.library.apply_chat_template(chat[:turn], add_generation_prompt=True)["input_ids"]
        assert before == read
    assert "its answer" not in tokenizer.library.decode(found[1][0])
    (alone,) = read_chat(tokenizer, chat[:2])
    assert alone == found[0]


DROPPED = (
    "{% for m in messages %}<{{ m.role }}> {% if m.role == 'assistant' %}{% generation %}{{ m.content }} "
    "{% endgeneration %}{% else %}{{ m.content }} {% endif %}{% endfor %}"
)
"""Ends what the assistant says with a space."""


@pytest.mark.parametrize("chat", [PLAIN, BEGUN], ids=["user first", "assistant first"])
def test_marks_whose_last_character_is_dropped_end_where_they_end(tmp_path: Path, chat: Chat) -> None:
    """White space is no token here; the library's own mask then runs to the end of the chat."""
    words = {word: number for number, word in enumerate(["?", "<user>", "<assistant>", *said_in(PLAIN), "a"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    facts = {"tokenizer_class": "TokenizersBackend", "chat_template": DROPPED}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(facts))
    library = AutoTokenizer.from_pretrained(tmp_path)
    theirs = library.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)["assistant_masks"]
    assert sum(theirs) > len(said_in(chat, "assistant"))
    (found,) = predicted(TextTokenizer(library), chat)
    assert " ".join(found).split() == said_in(chat, "assistant")


def said_in(chat: Chat, role: str = "") -> list[str]:
    """The words of a chat, of one role if it is named."""
    return " ".join(message["content"] for message in chat if role in ("", message["role"])).split()


def test_no_token_is_in_two_turns(opened: Any) -> None:
    """Words that would grow together with what stands before them are encoded as a model writes them behind it."""
    tokenizer, chat = (
        opened("llama3", "{% for m in messages %}{{ m.content }}{% endfor %}"),
        messages("the pe", "ople of"),
    )
    ((ids, labels),) = read_chat(tokenizer, chat)
    assert ids != tokenizer.encode_verbatim(["the people of"])[0]
    (_, before), (said, after) = parts(ids, labels)
    assert said and tokenizer.library.decode(after) == "ople of"
    assert before == generation_job.tokenise(tokenizer.library, ["the pe"], True, "")[0]


@pytest.mark.parametrize(
    ("template", "chat", "words"),
    [
        ("FORCED", PLAIN, "begins a turn of the assistant's as it asks for the turn .it writes .*where it asks with"),
        ("CHATML", messages("hello", "\ud83d"), "in whole characters"),
        ("GEMMA", BEGUN, "that the template takes .roles must alternate"),
        (  # a mark around everything
            "{% generation %}{% for m in messages %}{{ m.content }}. {% endfor %}{% endgeneration %}",
            PLAIN,
            "marks what the assistant says, and nothing else .it marks 'hello to the others",
        ),
        (  # a mark in a macro: the library counts it from where the macro is called
            "{% macro turn(m) %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
            "{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endmacro %}"
            "{% for m in messages %}{{ turn(m) }}{% endfor %}",
            PLAIN,
            "marks what the assistant says, and nothing else",
        ),
        (  # a mark that ends too early
            "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content[:3] }}"
            "{% endgeneration %}{{ m.content[3:] }}{% else %}{{ m.content }}{% endif %}. {% endfor %}",
            PLAIN,
            "marks all that the assistant says .it marks 'yes'",
        ),
        ("{{ messages | length }}{{ messages[-1].content }}", PLAIN, "begins a turn of the assistant's as it asks"),
    ],
)
def test_what_cannot_be_told_is_refused(template: str, chat: Chat, words: str, opened: Any) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        read_chat(opened("qwen", template), chat)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("chat", "words"),
    [
        ([], "a list of messages with role and content"),
        ("hello", "a list of messages with role and content"),
        ([{"role": "user"}], "whose role and content are texts"),
        ([{"role": "user", "content": "hi"}], "in which the assistant says something"),
    ],
)
def test_what_is_no_chat_is_refused(chat: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_chat(chat)
