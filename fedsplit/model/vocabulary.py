"""Tokenizers: loads the tokenizer of a model's folder, and encodes texts for training, evaluation and generation."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsplit.errors import SettingError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
"""Patterns of the names of a tokenizer's files in a model's folder."""

_READY = "tokenizer.json"

_PIECES = ("tokenizer.model", "spiece.model", "sentencepiece*")
"""Names of SentencePiece models. The models need the sentencepiece library."""

_VOCABULARIES = (*_PIECES, "vocab.*", "tekken.json", "tiktoken.model")
"""Files from which transformers can build a tokenizer. Without a file, transformers may build an empty tokenizer."""

_AT_ONCE = 16
"""Number of texts in one call of the tokenizer. The library needs about fifty times the memory of the texts."""

_HALF = re.compile("[\ud800-\udfff]")
"""Halves of surrogate pairs, from JSON or a command line."""

_CHARACTERS = ("\n", "a", ".", "0", "\t")
"""Characters for trials, in order. `TextTokenizer` finds the special tokens around a text by trials."""


def has_vocabulary(folder: Path) -> bool:
    """Returns True if a folder has a file from which a tokenizer can be built."""
    if (folder / _READY).is_file():
        return True
    return any(any(folder.glob(pattern)) for pattern in _VOCABULARIES)


def tokenizer_files(folder: Path) -> list[Path]:
    """Returns the files of a model's folder from which transformers makes a tokenizer.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("tokenizer.json", "vocab.json", "config.json"):
        ...     (folder / name).touch()
        >>> [file.name for file in tokenizer_files(folder)]
        ['tokenizer.json', 'vocab.json']
    """
    found = {file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)}
    return sorted(file for file in found if file.is_file())


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Loads the transformers tokenizer of a model's folder.

    Raises:
        SettingError: The folder has no tokenizer, or the tokenizer cannot be read.
    """
    try:
        if not has_vocabulary(path):
            raise FileNotFoundError("no tokenizer in it")
        from transformers import AutoTokenizer  # takes seconds to import

        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  # the libraries raise nothing narrower
        raise _refused(path, error) from None


def open_tokenizer(folder: Path) -> TextTokenizer:
    """Returns the `TextTokenizer` of a model's folder.

    Args:
        folder: Folder of the model.

    Raises:
        SettingError: The folder has no tokenizer, or the tokenizer cannot be read.
    """
    return TextTokenizer(load_tokenizer(folder))


class TextTokenizer:
    """Encodes texts as token ids, without padding or truncation.

    The methods differ in special tokens (BOS, EOS): `encode` adds special tokens at both ends of a text,
    `encode_prompt` at the beginning only, `encode_continuation` and `encode_verbatim` not at all.

    Attributes:
        library: The transformers tokenizer.

    Example:
        >>> from fedsplit.settings.config import BUNDLED_MODEL
        >>> tokenizer = open_tokenizer(BUNDLED_MODEL)
        >>> (ids,) = tokenizer.encode(["My fellow Americans"])
        >>> tokenizer.library.decode(ids)
        'My fellow Americans'
    """

    def __init__(self, library: PreTrainedTokenizerBase) -> None:
        """Wraps a transformers tokenizer."""
        self.library = library

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of complete texts, with special tokens at the beginning and end of each."""
        return self._encode(texts, special=True)

    def encode_prompt(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of beginnings of texts, with special tokens at the beginning of each."""
        closing = len(self.closing)
        # Not `ids[:-closing]`, which would be empty for a tokenizer without closing tokens.
        return [ids[: len(ids) - closing] for ids in self.encode(texts)]

    def encode_verbatim(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of texts with special tokens inside, such as rendered chats."""
        return self._encode(texts, special=False)

    def encode_continuation(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of texts that continue an earlier text: without special tokens or an added space.

        Some tokenizers, such as SentencePiece's, put a space before every text. To avoid the space, a text is encoded
        after a single character, and the character's tokens are removed.
        """
        if not self._adds_a_space:
            return self.encode_verbatim(texts)
        encoded: dict[int, list[int]] = {}
        for character in self._known_characters:
            remaining = [number for number in range(len(texts)) if number not in encoded]
            if remaining:
                encoded |= self._after(character, {number: texts[number] for number in remaining})

        # The first token of a remaining text merges with every character of the trials.
        remaining = [number for number in range(len(texts)) if number not in encoded]
        with_space = self.encode_verbatim([texts[number] for number in remaining])
        encoded |= dict(zip(remaining, with_space, strict=True))
        return [encoded[number] for number in range(len(texts))]

    def end_text(self, ids: Sequence[int], end: int) -> list[int]:
        """Appends the tokenizer's closing special tokens to a text, and the end token unless already the last token.

        Args:
            ids: Tokens from `encode_prompt` or `encode_continuation`.
            end: Id of the end token.
        """
        closed = [*ids, *self.closing]
        return closed if closed[-1:] == [end] else [*closed, end]

    @cached_property
    def added(self) -> tuple[str, ...]:
        """Texts of the tokens that were added to the vocabulary, including special tokens."""
        contents = (token.content for token in self.library.added_tokens_decoder.values())
        return tuple(content for content in contents if content.strip())

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """Special tokens that the tokenizer adds before and after a text."""
        for character in self._known_characters:
            (bare,) = self.encode_verbatim([character])
            (full,) = self.encode([character])
            # A character that the tokenizer drops cannot be found among the special tokens.
            if not bare:
                continue
            length = len(bare)
            starts = [start for start in range(len(full)) if full[start : start + length] == bare]
            if len(starts) == 1:  # otherwise the character's tokens are among the special tokens, too
                (start,) = starts
                return full[:start], full[start + length :]
        return [], []

    @cached_property
    def _known_characters(self) -> list[str]:
        """Characters of `_CHARACTERS` that the tokenizer accepts."""
        known = []
        for character in _CHARACTERS:
            with contextlib.suppress(SettingError):  # a tokenizer may have no token for unknown text
                self.encode_verbatim([character])
                known.append(character)
        return known

    @property
    def beginning(self) -> list[int]:
        """Special tokens that the tokenizer adds at the beginning of a text."""
        return self._around[0]

    @property
    def closing(self) -> list[int]:
        """Special tokens that the tokenizer adds at the end of a text."""
        return self._around[1]

    @cached_property
    def _adds_a_space(self) -> bool:
        """True if the letter "a" has other tokens at the beginning of a text than after a character."""
        (alone,) = self.encode_verbatim(["a"])
        after = [self._after(character, {0: "a"}) for character in self._known_characters]
        return all(tokens[0] != alone for tokens in after if tokens)

    def _after(self, character: str, texts: Mapping[int, str]) -> dict[int, list[int]]:
        """Encodes texts after a character, by number. A text that merges with the character is left out."""
        (before,) = self.encode_verbatim([character])
        encoded = self.encode_verbatim([character + text for text in texts.values()])
        after = {}
        for number, ids in zip(texts, encoded, strict=True):
            if ids[: len(before)] == before:
                after[number] = ids[len(before) :]
        return after

    def _encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        """Encodes texts some at a time.

        Raises:
            SettingError: The tokenizer refuses a text.
        """
        encoded: list[list[int]] = []
        for start in range(0, len(texts), _AT_ONCE):
            some = list(texts[start : start + _AT_ONCE])
            try:
                encoded += self._encode_some(some, special)
            except Exception as error:  # noqa: BLE001  # the libraries raise nothing narrower
                allowed = "a model whose tokenizer takes every text"
                raise SettingError("model", f"{self.library.name_or_path} ({first_line(error)})", allowed) from None
        return encoded

    def _encode_some(self, texts: list[str], special: bool) -> list[list[int]]:
        library = self.library
        if not self._is_plain:
            ids: list[list[int]] = library(
                texts, add_special_tokens=special, return_attention_mask=False, verbose=False
            )["input_ids"]
            return ids
        # A tokenizer.json may ask for padding or truncation, which transformers switches off for a plain call.
        backend = library.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = library.split_special_tokens
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=special)]

    @cached_property
    def _is_plain(self) -> bool:
        """True if transformers adds nothing to the result of the tokenizers library.

        The tokenizers library alone takes a half to three quarters of the time, without a search for the position of
        each token in the text. A few classes of transformers change texts or tokens, such as CodeLlama's.
        """
        from transformers import PreTrainedTokenizerFast as Plain

        if not isinstance(self.library, Plain):
            return False
        own_class = type(self.library)
        return all(getattr(own_class, name) is getattr(Plain, name) for name in ("__call__", "_encode_plus"))


def is_text(text: str) -> bool:
    """Returns True if a string can be encoded as UTF-8, as tokenizers require: without half a surrogate pair.

    Example:
        >>> is_text("Größe"), is_text(chr(0xD83D))
        (True, False)
    """
    return text.isascii() or not _HALF.search(text)


def render(tokenizer: PreTrainedTokenizerBase, chat: Sequence[Mapping[str, Any]], prompt: bool = False) -> str:
    """Renders a chat as text with the tokenizer's template.

    Args:
        tokenizer: The transformers tokenizer.
        chat: The messages.
        prompt: If true, the text ends with the beginning of the assistant's next turn.
    """
    text: str = tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=prompt)
    return text


def render_marked(
    tokenizer: PreTrainedTokenizerBase, chat: Sequence[Mapping[str, Any]]
) -> tuple[str, list[tuple[int, int]]]:
    """Renders a chat as text with the tokenizer's template, and finds the words of the assistant in the text.

    Args:
        tokenizer: The transformers tokenizer, with a template that has generation marks.
        chat: The messages.

    Returns:
        The text, and the (start, end) of each marked span.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = []
    for message in chat:  # columns of a data set fill missing keys with None, which templates would write
        messages.append({key: value for key, value in message.items() if value is not None})
    texts, marks = render_jinja_template(
        conversations=[messages],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return texts[0], marks[0]


def _refused(folder: Path, error: Exception) -> SettingError:
    """Returns the error to raise for a tokenizer that cannot be loaded.

    Without the sentencepiece library, transformers asks for a different library. The error names the right library.
    """
    reason = first_line(error)
    pieces = [file.name for pattern in _PIECES for file in sorted(folder.glob(pattern))]
    missing = find_spec("sentencepiece") is None or "tiktoken" in reason
    if pieces and missing and not (folder / _READY).is_file():
        reason = f"its {pieces[0]} cannot be read; SentencePiece's needs pip install 'fedsplit[sentencepiece]'"
    allowed = "a folder with a tokenizer.json that can be read, or another tokenizer that transformers opens"
    return SettingError("model", f"{folder} ({reason})", allowed)
