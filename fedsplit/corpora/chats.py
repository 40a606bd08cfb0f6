"""Encodes chats by the tokenizer's template, with labels on the assistant's turns.

Every label is proved against the text. The text of a chat is cut into pieces at each place where the assistant begins
or ends to speak. A token is predicted if the token belongs to a piece of the assistant's. No token lies in two pieces.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fedsplit.model.kernels import IGNORED
from fedsplit.model.vocabulary import TextTokenizer, is_text, render, render_marked

Chat = list[dict[str, Any]]
"""Messages of a chat, each with a role and a content."""

Span = tuple[int, int]
"""Start and end of a piece of a text, in characters."""

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
"""Tag by which a chat template marks the assistant's words."""

_THOUGHT = "</think>"
"""End of the reasoning before an answer. Many templates leave the reasoning of earlier turns out."""


class _UnclearError(ValueError):
    """The assistant's words cannot be located in the text of a chat."""


@dataclass(frozen=True)
class _Turn:
    """A turn of the assistant's, at the end of a chat.

    Attributes:
        text: Text of the chat up to the end of the turn.
        start: Place in the text where the assistant's words begin.
        content: Content of the turn's message.
    """

    text: str
    start: int
    content: str

    @property
    def span(self) -> Span:
        """Place of the assistant's words, including the end of the turn."""
        return self.start, len(self.text)


def check_chat(chat: object) -> Chat:
    """Checks that a value is a chat, and returns the chat.

    Raises:
        ValueError: The value is no chat, or the assistant has no turn. The message describes possible values.

    Example:
        >>> check_chat([{"role": "user", "content": "hello"}])
        Traceback (most recent call last):
        ValueError: a chat in which the assistant says something
    """
    turns = chat if isinstance(chat, list) else []
    if not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("a list of messages with role and content")
    for turn in turns:
        has_texts = isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        if not has_texts:
            raise ValueError("a list of messages whose role and content are texts")
    if not any(turn["role"] == "assistant" for turn in turns):
        raise ValueError("a chat in which the assistant says something")
    return turns


def check_answers(prompt: object, chosen: object, rejected: object) -> tuple[Chat, Chat]:
    """Checks that three values are a prompt and two answers, and returns the chats with the one and the other answer.

    Args:
        prompt: Messages before the answers; None if both answers are whole chats.
        chosen: The chosen answer, a list with one message of the assistant's; or a whole chat.
        rejected: The rejected answer, as `chosen`.

    Raises:
        ValueError: The values are no chats that differ in one answer of the assistant's.

    Example:
        >>> yes, no = [{"role": "assistant", "content": "yes"}], [{"role": "assistant", "content": "no"}]
        >>> chats = check_answers([{"role": "user", "content": "really?"}], yes, no)
        >>> [chat[-1]["content"] for chat in chats]
        ['yes', 'no']
    """
    before = [] if prompt is None else prompt
    if not all(isinstance(part, list) for part in (before, chosen, rejected)):
        raise ValueError("a prompt and two answers that are lists of messages, all three")
    chats = [check_chat([*before, *answer]) for answer in (chosen, rejected)]  # type: ignore[misc]
    for chat in chats:
        ends_in_assistant = chat[-1]["role"] == "assistant"
        begins_alike = chat[:-1] == chats[0][:-1]
        ends_in_answer = ends_in_assistant and begins_alike
        if not ends_in_answer or (prompt is not None and len(chat) != len(before) + 1):  # type: ignore[arg-type]
            raise ValueError("two chats that differ in their last message alone, an answer of the assistant's")
    return chats[0], chats[1]


def read_chat(tokenizer: TextTokenizer, chat: Chat) -> list[tuple[list[int], list[int]]]:
    """Returns the tokens of a chat, with labels on the assistant's turns.

    Most templates only add to the text of earlier turns, so that the chat is one sequence. Templates of reasoning
    models leave out the reasoning of earlier turns. Every turn of the assistant's is then a separate sequence, behind
    the prompt for the turn.

    Args:
        tokenizer: Tokenizer of the model, with a chat template.
        chat: Messages of the chat.

    Returns:
        Token ids and labels of each sequence.

    Raises:
        ValueError: The template refuses the chat, or the assistant's words cannot be located in the text.
    """
    with _explained():
        texts = _texts_with_spans(tokenizer, chat)
    return [_labelled(tokenizer, text, spans) for text, spans in texts]


def read_answer(tokenizer: TextTokenizer, chat: Chat) -> tuple[list[int], list[int]]:
    """Returns the tokens of a chat that ends with a turn of the assistant's, with labels on that turn alone.

    Args:
        tokenizer: Tokenizer of the model, with a chat template.
        chat: Messages of the chat.

    Returns:
        Token ids and labels.

    Raises:
        ValueError: The template refuses the chat, or the assistant's words cannot be located in the text.
    """
    with _explained():
        text, spans = _turn_with_spans(tokenizer, chat, _last_turn(tokenizer, chat))
    return _labelled(tokenizer, text, spans)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turns the errors of a chat template into a `ValueError`."""
    try:
        yield
    except _UnclearError:
        raise
    except Exception as error:  # noqa: BLE001  # a template may raise anything: jinja2's errors, and its own
        raise ValueError(f"a chat that the template takes ({' '.join(str(error).split())[:200]})") from None


def _has_marks(tokenizer: TextTokenizer) -> bool:
    """Returns True if the template marks the assistant's words."""
    return bool(_GENERATION.search(str(tokenizer.library.get_chat_template())))


def _turn_with_spans(tokenizer: TextTokenizer, chat: Chat, turn: _Turn) -> tuple[str, list[Span]]:
    """Returns the text of a chat that ends with a turn of the assistant's, with the places of the turn's words."""
    if _has_marks(tokenizer):
        return turn.text, _marked(tokenizer, chat, [turn], turn.start)
    return turn.text, [_without_trailing_space(tokenizer, turn)]


def _texts_with_spans(tokenizer: TextTokenizer, chat: Chat) -> list[tuple[str, list[Span]]]:
    """Returns the texts of a chat, each with the places where the assistant speaks."""
    ends = [number for number, message in enumerate(chat, 1) if message["role"] == "assistant"]
    turns = [_last_turn(tokenizer, chat[:end]) for end in ends]

    # The template only adds to the text of earlier turns: one text holds all of them.
    full_text = render(tokenizer.library, chat)
    if all(full_text.startswith(turn.text) for turn in turns):
        if _has_marks(tokenizer):
            return [(full_text, _marked(tokenizer, chat, turns))]
        return [(full_text, [_without_trailing_space(tokenizer, turn) for turn in turns])]

    # The template rewrites earlier turns: each turn gets a separate text.
    texts = []
    for turn, end in zip(turns, ends, strict=True):
        texts.append(_turn_with_spans(tokenizer, chat[:end], turn))
    return texts


def _last_turn(tokenizer: TextTokenizer, chat: Chat) -> _Turn:
    """Locates the assistant's turn at the end of a chat: the text that the model writes after the prompt.

    Raises:
        _UnclearError: The text of the chat does not begin with the prompt for the turn.
    """
    text = render(tokenizer.library, chat)
    is_first = len(chat) == 1
    prompt = _first_prompt(tokenizer, chat) if is_first else _prompt(tokenizer, chat)
    if not text.startswith(prompt):
        needed = "a chat whose template begins a turn of the assistant's as it asks for the turn"
        raise _UnclearError(f"{needed} (it writes {_shown(text, prompt)} where it asks with {_shown(prompt, text)})")
    return _Turn(text, len(prompt), chat[-1]["content"])


def _prompt(tokenizer: TextTokenizer, chat: Chat) -> str:
    """Returns the prompt for a chat's last turn, including the header of the turn."""
    before = chat[:-1]
    prompt = render(tokenizer.library, before, prompt=True)
    if prompt != render(tokenizer.library, before):
        return prompt

    # The template adds no header for a prompt; it may write the header together with the turn.
    head = _head(tokenizer, chat)
    has_header = head.startswith(prompt) and head[len(prompt) :].strip()
    return head if has_header else prompt


def _first_prompt(tokenizer: TextTokenizer, chat: Chat) -> str:
    """Returns the text before the words of an assistant who speaks first. Templates have no prompt for this case."""
    head = _head(tokenizer, chat)
    text = render(tokenizer.library, chat)
    text_and_prompt = render(tokenizer.library, chat, prompt=True)
    header = text_and_prompt[len(text) :] if text_and_prompt.startswith(text) else ""
    if header and header in head:
        return head[: head.rfind(header) + len(header)]
    return head


def _head(tokenizer: TextTokenizer, chat: Chat) -> str:
    """Returns the text before the words of a chat's last message."""
    last = chat[-1]
    # All texts and not the content alone: a template may write another one first, such as the reasoning.
    texts_of_message = [key for key, value in last.items() if key != "role" and isinstance(value, str)]
    rendered = []
    for words in ("A", "B"):  # the text before the words is common to both
        message = last | dict.fromkeys(texts_of_message, words)
        changed = [*chat[:-1], message]
        rendered.append(render(tokenizer.library, changed))
    return rendered[0][: _common_length(*rendered)]


def _common_length(left: str, right: str) -> int:
    """Returns the length of the common beginning of two texts."""
    for place, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return place
    return min(len(left), len(right))


def _shown(text: str, other: str) -> str:
    """Returns the characters of a text around the first difference from a second text."""
    place = _common_length(text, other)
    return repr(text[max(0, place - 20) : place + 20])


def _without_trailing_space(tokenizer: TextTokenizer, turn: _Turn) -> Span:
    """Returns the place of a turn's words and end token, without white space behind the end token."""
    start, end = turn.span
    words = turn.text[start:end].rstrip()
    ends_in_token = words.endswith(tokenizer.added)
    return (start, start + len(words)) if ends_in_token else (start, end)


def _marked(
    tokenizer: TextTokenizer,
    chat: Chat,
    turns: Sequence[_Turn],
    since: int = 0,
) -> list[Span]:
    """Returns the places that the template's generation tags mark in some turns.

    Args:
        tokenizer: Tokenizer of the model.
        chat: Messages of the chat.
        turns: The turns to look at.
        since: Place in the text from which marks must belong to the turns. Earlier marks belong to further turns.

    Raises:
        _UnclearError: A mark lies outside of the turns, or the marks leave out some of a turn's words.
    """
    text, marks = render_marked(tokenizer.library, chat)
    spans = []
    for turn in turns:
        low, high = turn.span
        within = [(start, end) for start, end in marks if low <= start < end <= high]
        marked = "".join(text[start:end] for start, end in within)
        answer = turn.content.split(_THOUGHT)[-1].strip()
        if within and answer in text[low:high] and answer not in marked:
            raise _UnclearError(f"a chat whose template marks all that the assistant says (it marks {marked[:60]!r})")
        spans += within

    for start, end in marks:
        is_empty = start >= end
        if since < end and not is_empty and (start, end) not in spans:
            needed = "a chat whose template marks what the assistant says, and nothing else"
            raise _UnclearError(f"{needed} (it marks {text[start:end][:60]!r})")
    return spans


def _labelled(tokenizer: TextTokenizer, text: str, spans: Sequence[Span]) -> tuple[list[int], list[int]]:
    """Returns the token ids of a text, with labels on the spans.

    Raises:
        _UnclearError: The text cannot be encoded.
    """
    if not is_text(text):
        raise _UnclearError("a chat in whole characters (it has half of one, which UTF-8 cannot write)")
    # A set, since a span may begin where another one ends, or where the text begins: a piece without text has no
    # tokens.
    places = {0, len(text)}
    for start, end in spans:
        places |= {start, end}
    bounds = sorted(places)
    pieces = _pieces(tokenizer, text, bounds)
    ids: list[int] = []
    labels: list[int] = []
    # There is one bound more than there are pieces: the end of the text.
    for tokens, start in zip(pieces, bounds, strict=False):
        is_predicted = any(low <= start < high for low, high in spans)
        ids += tokens
        labels += tokens if is_predicted else [IGNORED] * len(tokens)
    return ids, labels


def _pieces(tokenizer: TextTokenizer, text: str, bounds: Sequence[int]) -> list[list[int]]:
    """Returns the token ids of each piece of a text.

    If no token lies in two pieces, the tokens are those of the undivided text. Otherwise each piece is encoded alone,
    as a prompt is before the model continues it.
    """
    texts = [text[start:end] for start, end in pairwise(bounds)]
    undivided, first = tokenizer.encode_verbatim([text, texts[0]])
    alone = [first, *tokenizer.encode_continuation(texts[1:])]
    if [token for piece in alone for token in piece] == undivided:
        return alone

    # If the tokens of every beginning of the text begin the undivided tokens, their numbers show where to cut.
    beginnings = tokenizer.encode_verbatim([text[:end] for end in bounds[1:]])
    if all(undivided[: len(ids)] == ids for ids in beginnings):
        ends = [len(ids) for ids in beginnings]
        return [undivided[start:end] for start, end in pairwise([0, *ends])]
    return alone
