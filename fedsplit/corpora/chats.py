"""Chats to tokens by the tokenizer's template, and labels on what the assistant says.

Every label is proved against the text. A chat's text is cut where the assistant begins and ends to speak, and a token
is predicted if it belongs to a piece that the assistant says. No token lies in two pieces.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fedsplit.model.kernels import IGNORED
from fedsplit.model.vocabulary import TextTokenizer, is_text, render, render_marked

Chat = list[dict[str, Any]]
"""Messages, each with a role and a content."""

Span = tuple[int, int]
"""Where a piece of a text begins, and where it is over."""

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
"""Marks the assistant's words in a chat template."""

_THOUGHT = "</think>"
"""Ends the reasoning before an answer; many templates write the reasoning of earlier turns no more."""


class _UnclearError(ValueError):
    """It cannot be told what of a chat's text the assistant says."""


@dataclass(frozen=True)
class _Turn:
    """A turn of the assistant's, at the end of a chat.

    Attributes:
        text: The text of the chat up to the turn's end.
        start: Where the assistant's words begin in it.
        content: What the message says.
    """

    text: str
    start: int
    content: str

    @property
    def span(self) -> Span:
        """Place of the assistant's words and of what ends them."""
        return self.start, len(self.text)


def check_chat(chat: Any) -> Chat:
    """Makes sure that a chat is one.

    Raises:
        ValueError: It is none, or the assistant says nothing in it.
    """
    turns = chat if isinstance(chat, list) else []
    if not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("a list of messages with role and content")
    if not all(isinstance(turn.get(key), str) for turn in turns for key in ("role", "content")):
        raise ValueError("a list of messages whose role and content are texts")
    if not any(turn["role"] == "assistant" for turn in turns):
        raise ValueError("a chat in which the assistant says something")
    return turns


def read_chat(tokenizer: TextTokenizer, chat: Chat) -> list[tuple[list[int], list[int]]]:
    """Tokens of a chat, and labels on what the assistant says.

    A chat is one sequence, if its template only ever adds to the text of the turns before. Templates of models that
    reason leave earlier reasoning out. Under these every turn of the assistant's is a sequence of its own, behind the
    prompt that the model reads when it writes that turn.

    Args:
        tokenizer: The model's, with a chat template.
        chat: The messages.

    Returns:
        Tokens and labels of each sequence.

    Raises:
        ValueError: The template refuses the chat, or it cannot be told what of its text the assistant says.
    """
    try:
        written = _written(tokenizer, chat)
    except _UnclearError:
        raise
    except Exception as error:  # noqa: BLE001  # a template may raise what it likes: jinja2's errors, and its own
        raise ValueError(f"a chat that the template takes ({' '.join(str(error).split())[:200]})") from None
    return [_labelled(tokenizer, text, spans) for text, spans in written]


def _written(tokenizer: TextTokenizer, chat: Chat) -> list[tuple[str, list[Span]]]:
    """Texts of a chat, and where the assistant speaks in each."""
    ends = [number for number, message in enumerate(chat, 1) if message["role"] == "assistant"]
    turns = [_last_turn(tokenizer, chat[:end]) for end in ends]
    marks = bool(_GENERATION.search(str(tokenizer.library.get_chat_template())))
    whole = render(tokenizer.library, chat)
    if all(whole.startswith(turn.text) for turn in turns):
        spans = _marked(tokenizer, chat, turns) if marks else [_without_rest(tokenizer, turn) for turn in turns]
        return [(whole, spans)]
    written = []
    for turn, end in zip(turns, ends, strict=True):
        spans = _marked(tokenizer, chat[:end], [turn], turn.start) if marks else [_without_rest(tokenizer, turn)]
        written.append((turn.text, spans))
    return written


def _last_turn(tokenizer: TextTokenizer, chat: Chat) -> _Turn:
    """Finds the assistant's words in a chat that ends with them: what the model writes when it is asked for the turn.

    Raises:
        _UnclearError: The text with the turn does not begin as the text that asks for the turn.
    """
    before, text = chat[:-1], render(tokenizer.library, chat)
    prompt = _prompt(tokenizer, chat) if before else _first_prompt(tokenizer, chat)
    if not text.startswith(prompt):
        words = "a chat whose template begins a turn of the assistant's as it asks for the turn"
        raise _UnclearError(f"{words} (it writes {_shown(text, prompt)} where it asks with {_shown(prompt, text)})")
    return _Turn(text, len(prompt), chat[-1]["content"])


def _prompt(tokenizer: TextTokenizer, chat: Chat) -> str:
    """Text that asks for a chat's last turn; with the turn's header, too, if the template writes it with the turn."""
    prompt = render(tokenizer.library, chat[:-1], prompt=True)
    if prompt != render(tokenizer.library, chat[:-1]):
        return prompt
    head = _head(tokenizer, chat)
    has_header = head.startswith(prompt) and head[len(prompt) :].strip()
    return head if has_header else prompt


def _first_prompt(tokenizer: TextTokenizer, chat: Chat) -> str:
    """Text before the words of an assistant who speaks first, whom no template is asked for."""
    head = _head(tokenizer, chat)
    said, asked = render(tokenizer.library, chat), render(tokenizer.library, chat, prompt=True)
    header = asked[len(said) :] if asked.startswith(said) else ""
    return head[: head.rfind(header) + len(header)] if header and header in head else head


def _head(tokenizer: TextTokenizer, chat: Chat) -> str:
    """Text before the words of a chat's last message: what stays when the words are others."""
    last = chat[-1]
    words = [key for key, value in last.items() if key != "role" and isinstance(value, str)]
    others = [[*chat[:-1], last | dict.fromkeys(words, other)] for other in ("A", "B")]
    one, another = (render(tokenizer.library, other) for other in others)
    return one[: _alike(one, another)]


def _alike(one: str, another: str) -> int:
    """Counts the characters with which two texts begin alike."""
    pairs = enumerate(zip(one, another, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(another)))


def _shown(text: str, other: str) -> str:
    """A few characters of a text from where it differs from another one."""
    same = _alike(text, other)
    return repr(text[max(0, same - 20) : same + 20])


def _without_rest(tokenizer: TextTokenizer, turn: _Turn) -> Span:
    """The place of a turn's words and its end token, without white space behind the end token."""
    start, end = turn.span
    said = turn.text[start:end].rstrip()
    return (start, start + len(said)) if said.endswith(tokenizer.added) else (start, end)


def _marked(tokenizer: TextTokenizer, chat: Chat, turns: Sequence[_Turn], since: int = 0) -> list[Span]:
    """Places of some turns' words by the template's generation marks.

    Args:
        tokenizer: The model's.
        chat: The messages.
        turns: The turns that are asked for.
        since: Where marks begin to matter. Before it are those of turns that are not asked for.

    Raises:
        _UnclearError: A mark is not within a turn, or leaves out some of a turn's words.
    """
    text, marks = render_marked(tokenizer.library, chat)
    found = []
    for turn in turns:
        low, high = turn.span
        within = [(start, end) for start, end in marks if low <= start < end <= high]
        said, words = "".join(text[start:end] for start, end in within), turn.content.split(_THOUGHT)[-1].strip()
        if within and words in text[low:high] and words not in said:
            raise _UnclearError(f"a chat whose template marks all that the assistant says (it marks {said[:60]!r})")
        found += within
    for start, end in marks:
        if since < end and start < end and (start, end) not in found:
            words = "a chat whose template marks what the assistant says, and nothing else"
            raise _UnclearError(f"{words} (it marks {text[start:end][:60]!r})")
    return found


def _labelled(tokenizer: TextTokenizer, text: str, spans: Sequence[Span]) -> tuple[list[int], list[int]]:
    """Tokens of a text, and labels on the spans.

    Raises:
        _UnclearError: No tokenizer takes the text.
    """
    if not is_text(text):
        raise _UnclearError("a chat in whole characters (it has half of one, which UTF-8 cannot write)")
    bounds = sorted({0, len(text), *(place for span in spans for place in span)})
    ids, labels = [], []
    for tokens, (start, _) in zip(_pieces(tokenizer, text, bounds), pairwise(bounds), strict=True):
        ids += tokens
        labels += tokens if any(low <= start < high for low, high in spans) else [IGNORED] * len(tokens)
    return ids, labels


def _pieces(tokenizer: TextTokenizer, text: str, bounds: Sequence[int]) -> list[list[int]]:
    """Tokens of the pieces of a text: those of the whole text, where none of them lies in two pieces.

    Else a piece has the tokens that it has on its own, as a prompt has when the model goes on from it.
    """
    texts = [text[start:end] for start, end in pairwise(bounds)]
    whole, first = tokenizer.encode_verbatim([text, texts[0]])
    alone = [first, *tokenizer.encode_continuation(texts[1:])]
    if [token for piece in alone for token in piece] == whole:
        return alone
    up_to = tokenizer.encode_verbatim([text[:end] for end in bounds[1:]])
    if all(whole[: len(ids)] == ids for ids in up_to):
        ends = [len(ids) for ids in up_to]
        return [whole[start:end] for start, end in pairwise([0, *ends])]
    return alone
