"""A model's folder to its tokenizer, and texts to the tokens that training, evaluation and generation all read."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedsplit.allowed import SettingError

TOKENIZER_FILES = (
    "token*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
    "spiece.model",
    "sentencepiece*",
    "tekken.json",
    "tiktoken.model",
)
"""What lies beside a model for its tokenizer, by the names that transformers gives it."""

_READY = "tokenizer.json"

_PIECES = ("tokenizer.model", "spiece.model", "sentencepiece*")
"""What SentencePiece writes, by the names that transformers gives it; its own library reads it."""

_VOCABULARIES = (*_PIECES, "vocab.*", "tekken.json", "tiktoken.model")
"""Any of these is enough for transformers to make a tokenizer of; without any, it may make an empty one."""

_AT_ONCE = 16
"""Texts that are encoded together: what the library makes of a text takes some fifty times its memory."""

_HALF = re.compile("[\ud800-\udfff]")
"""Halves of surrogate pairs, which JSON and a command line may bring in."""

_CHARACTERS = ("\n", "a", ".", "0", "\t")
"""Characters that are tried in turn to find out what a tokenizer puts around a text."""


def has_vocabulary(folder: Path) -> bool:
    """Whether there is anything in a folder that a tokenizer can be made of."""
    return (folder / _READY).is_file() or any(True for pattern in _VOCABULARIES for _ in folder.glob(pattern))


def load_tokenizer(path: Path) -> Any:
    """Loads the tokenizer of a model's folder as transformers does.

    Raises:
        SettingError: There is none, or it cannot be read.
    """
    try:
        if not has_vocabulary(path):
            raise FileNotFoundError("no tokenizer in it")
        from transformers import AutoTokenizer  # takes seconds to import

        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  # the libraries raise nothing narrower
        raise _refused(path, error) from None


def open_tokenizer(folder: Path) -> TextTokenizer:
    """Opens the tokenizer of a model's folder for texts.

    Raises:
        SettingError: There is none, or it cannot be read.
    """
    return TextTokenizer(load_tokenizer(folder))


class TextTokenizer:
    """Turns texts into token ids by transformers' tokenizer, without padding and at full length.

    Special tokens that the tokenizer adds (BOS, EOS) belong to the ends of a text: `whole` adds them at both ends,
    `opening` at the beginning, and `following` and `written` add none.

    Attributes:
        library: transformers' tokenizer.
    """

    def __init__(self, library: Any) -> None:
        """Wraps a tokenizer of transformers'."""
        self.library = library

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of whole texts, with the special tokens that the tokenizer adds at their beginnings and ends."""
        return self._encode(texts, special=True)

    def encode_prompt(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that go on, such as prompts: with special tokens at their beginnings only."""
        behind = len(self.closing)
        return [ids[: len(ids) - behind] for ids in self.encode(texts)]

    def encode_verbatim(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that have all their special tokens written in them, as chat templates do."""
        return self._encode(texts, special=False)

    def encode_continuation(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that other text stands before: without special tokens, and without a space put before.

        Some tokenizers put a space before every text, as SentencePiece's do. It is avoided by encoding the text behind
        a character whose tokens are then taken off.
        """
        if not self._puts_a_space_before:
            return self.encode_verbatim(texts)
        found: dict[int, list[int]] = {}
        for character in self._known:
            left = [number for number in range(len(texts)) if number not in found]
            if left:
                found |= self._behind(character, {number: texts[number] for number in left})
        last = [number for number in range(len(texts)) if number not in found]
        found |= dict(zip(last, self.encode_verbatim([texts[number] for number in last]), strict=True))
        return [found[number] for number in range(len(texts))]

    def end_text(self, ids: Sequence[int], end: int) -> list[int]:
        """Ends a text: with what the tokenizer adds behind texts, and with the end token unless it is there already.

        Args:
            ids: Tokens as `opening` or `following` gives them.
            end: The id of the end token.
        """
        closed = [*ids, *self.closing]
        return closed if closed[-1:] == [end] else [*closed, end]

    @cached_property
    def added(self) -> tuple[str, ...]:
        """Tokens that are added to the vocabulary, special ones among them, as they are written in a text."""
        return tuple(token.content for token in self.library.added_tokens_decoder.values() if token.content.strip())

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """Special tokens that the tokenizer adds before and behind a text."""
        for character in self._known:
            (bare,), (full,) = self.encode_verbatim([character]), self.encode([character])
            places = [at for at in range(len(full)) if bare and full[at : at + len(bare)] == bare]
            if len(places) == 1:
                return full[: places[0]], full[places[0] + len(bare) :]
        return [], []

    @cached_property
    def _known(self) -> list[str]:
        """Characters to try that the tokenizer takes."""
        known = []
        for character in _CHARACTERS:
            with contextlib.suppress(SettingError):  # a tokenizer without an unknown token takes some characters only
                self.encode_verbatim([character])
                known.append(character)
        return known

    @property
    def beginning(self) -> list[int]:
        """Special tokens that the tokenizer adds before a text."""
        return self._around[0]

    @property
    def closing(self) -> list[int]:
        """Special tokens that the tokenizer adds behind a text."""
        return self._around[1]

    @cached_property
    def _puts_a_space_before(self) -> bool:
        (alone,) = self.encode_verbatim(["a"])
        return all(behind[0] != alone for character in self._known if (behind := self._behind(character, {0: "a"})))

    def _behind(self, character: str, texts: Mapping[int, str]) -> dict[int, list[int]]:
        """Tokens of texts behind a character, by number; none of a text whose first token takes the character in."""
        (before,) = self.encode_verbatim([character])
        encoded = self.encode_verbatim([character + text for text in texts.values()])
        pairs = zip(texts, encoded, strict=True)
        return {number: ids[len(before) :] for number, ids in pairs if ids[: len(before)] == before}

    def _encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        found: list[list[int]] = []
        for start in range(0, len(texts), _AT_ONCE):
            some = list(texts[start : start + _AT_ONCE])
            try:
                found += self._encode_some(some, special)
            except Exception as error:  # noqa: BLE001  # the libraries raise nothing narrower
                words = "a model whose tokenizer takes every text"
                raise SettingError("model", f"{self.library.name_or_path} ({_first_line(error)})", words) from None
        return found

    def _encode_some(self, texts: list[str], special: bool) -> list[list[int]]:
        library = self.library
        if not self._is_plain:
            ids: list[list[int]] = library(
                texts, add_special_tokens=special, return_attention_mask=False, verbose=False
            )["input_ids"]
            return ids
        backend = library.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = library.split_special_tokens
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=special)]

    @cached_property
    def _is_plain(self) -> bool:
        """Whether transformers adds nothing to what the tokenizers library makes of a text.

        That library alone, which need not find the place of each token in its text, takes a half to three quarters of
        the time. A few classes of transformers change texts or tokens themselves, such as CodeLlama's.
        """
        from transformers import PreTrainedTokenizerFast

        kind, plain = type(self.library), PreTrainedTokenizerFast
        if not isinstance(self.library, plain):
            return False
        return all(getattr(kind, name) is getattr(plain, name) for name in ("__call__", "_encode_plus"))


def is_text(text: str) -> bool:
    """Tells whether tokenizers take a string: one that UTF-8 can write, without half of a surrogate pair."""
    return text.isascii() or not _HALF.search(text)


def render(tokenizer: Any, chat: Sequence[Mapping[str, Any]], prompt: bool = False) -> str:
    """Writes a chat as text by the tokenizer's template.

    Args:
        tokenizer: transformers'.
        chat: The messages.
        prompt: Whether the text asks the assistant for the next turn.
    """
    text: str = tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=prompt)
    return text


def render_marked(tokenizer: Any, chat: Sequence[Mapping[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
    """Writes a chat as text by the tokenizer's template, and tells from where to where its generation marks reach.

    Args:
        tokenizer: transformers'.
        chat: The messages.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{key: value for key, value in message.items() if value is not None} for message in chat]
    texts, marks = render_jinja_template(
        conversations=[messages],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return texts[0], marks[0]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _refused(folder: Path, error: Exception) -> SettingError:
    """What was wrong, in one line; transformers tells of another library where it lacks SentencePiece's."""
    reason = _first_line(error)
    pieces = [file.name for pattern in _PIECES for file in sorted(folder.glob(pattern))]
    missing = find_spec("sentencepiece") is None or "tiktoken" in reason
    if pieces and missing and not (folder / _READY).is_file():
        reason = f"its {pieces[0]} cannot be read; SentencePiece's needs pip install 'fedsplit[sentencepiece]'"
    words = "a folder with a tokenizer.json that can be read, or another tokenizer that transformers opens"
    return SettingError("model", f"{folder} ({reason})", words)
