"""Texts on the screen while they are written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_BEFORE = 8
"""Tokens of a prompt that are looked at, since some tokenizers write a token otherwise at the beginning of a text."""


class Words:
    """Tokens to text, piece by piece: what the next token may still change, half a character, waits for it."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        """Nothing has come yet.

        Args:
            tokenizer: The library's.
            prompt: The tokens before those that come; what they stand for is not given out.
        """
        self._tokenizer, self._ids = tokenizer, list(prompt[-_BEFORE:])
        self._given = len(self._read())

    def _read(self) -> str:
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def add(self, token: int) -> str:
        """A token to the text that is certain now."""
        self._ids.append(token)
        text = self._read()
        return "" if text.endswith(_BROKEN) else self._give(text)

    def end(self) -> str:
        """What waited for a token that does not come."""
        return self._give(self._read())

    def _give(self, text: str) -> str:
        piece, self._given = text[self._given :], max(self._given, len(text))
        return piece


class InTurn:
    """Shows texts that are written at the same time one after the other, the first of them as it comes."""

    def __init__(self, heads: Sequence[str], write: Callable[[str], object]) -> None:
        """Shows how the first text begins.

        Args:
            heads: How each text begins.
            write: Shows a piece.
        """
        self._waiting, self._write = list(heads), write
        self._over = [False] * len(heads)
        self._shown = 0
        self._show()

    def add(self, number: int, piece: str) -> None:
        """A text goes on."""
        self._waiting[number] += piece
        self._show()

    def end(self, number: int) -> None:
        """A text is over."""
        self._waiting[number] += "\n"
        self._over[number] = True
        self._show()

    def _show(self) -> None:
        while self._shown < len(self._waiting):
            if piece := self._waiting[self._shown]:
                self._write(piece)
                self._waiting[self._shown] = ""
            if not self._over[self._shown]:
                return
            self._shown += 1
