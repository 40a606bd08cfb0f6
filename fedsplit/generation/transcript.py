"""Shows growing texts on the screen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BROKEN = "\N{REPLACEMENT CHARACTER}"
"""Character that tokenizers return for an incomplete character."""

_CONTEXT = 8
"""Number of prompt tokens to decode with. Some tokenizers decode a token differently at the beginning of a text."""


class Detokeniser:
    """Decodes the tokens of a text one by one. An incomplete character waits for the completing token.

    Example:
        >>> class Bytes:  # a tokenizer with a token for each byte
        ...     def decode(self, ids, **options):
        ...         return bytes(ids).decode(errors="replace")
        >>> text = Detokeniser(Bytes(), prompt=[65])
        >>> [text.add(byte) for byte in "é!".encode()]  # é has two bytes
        ['', 'é', '!']
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> None:
        """Begins behind a prompt.

        Args:
            tokenizer: Tokenizer of transformers.
            prompt: Token ids of the prompt. The text of the prompt is not returned.
        """
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_CONTEXT:])
        self._returned = len(self._decode())

    def _decode(self) -> str:
        # A clean-up would remove spaces before punctuation, and change characters that are on the screen already.
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def add(self, token: int) -> str:
        """Adds a token, and returns the new complete characters."""
        self._ids.append(token)
        text = self._decode()
        return "" if text.endswith(_BROKEN) else self._new_part(text)

    def end(self) -> str:
        """Ends the text, and returns the incomplete characters."""
        return self._new_part(self._decode())

    def _new_part(self, text: str) -> str:
        piece = text[self._returned :]
        self._returned = max(self._returned, len(text))  # a text may shrink when a broken character is completed
        return piece


class OrderedOutput:
    r"""Shows several texts in order, though all texts grow at the same time.

    The first unfinished text is shown piece by piece. Later texts wait for the end of the first.

    Example:
        >>> output = OrderedOutput(["One:", "Two:"], write=lambda piece: print(repr(piece)))
        'One:'
        >>> output.add(1, " late")
        >>> output.add(0, " first")
        ' first'
        >>> output.end(0)
        '\n'
        'Two: late'
    """

    def __init__(self, heads: Sequence[str], write: Callable[[str], object]) -> None:
        """Shows the beginning of the first text.

        Args:
            heads: Beginning of each text.
            write: Function that shows a piece of text.
        """
        self._pending = list(heads)
        self._write = write
        self._ended = [False] * len(heads)
        self._current = 0
        self._show()

    def add(self, number: int, piece: str) -> None:
        """Adds a piece to a text."""
        self._pending[number] += piece
        self._show()

    def end(self, number: int) -> None:
        """Ends a text, with a line break."""
        self._pending[number] += "\n"
        self._ended[number] = True
        self._show()

    def _show(self) -> None:
        """Shows all pieces up to the end of the first unfinished text."""
        while self._current < len(self._pending):
            piece = self._pending[self._current]
            if piece:
                self._write(piece)
                self._pending[self._current] = ""
            if not self._ended[self._current]:
                return
            self._current += 1
