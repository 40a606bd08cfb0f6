"""Texts as they come: no half characters, and one after the other."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.generation.transcript import Detokeniser, OrderedOutput


class Bytes:
    """A tokenizer whose tokens are bytes, and which leaves out a space at the beginning, as some do."""

    def decode(self, ids: list[int], **how: Any) -> str:
        assert how == {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return bytes(ids).decode("utf-8", errors="replace").removeprefix(" ")


def pieces(prompt: str, text: bytes) -> list[str]:
    words = Detokeniser(Bytes(), list(prompt.encode()))
    return [*map(words.add, text), words.end()]


def test_half_a_character_waits() -> None:
    assert pieces("a", "né!".encode()) == ["n", "", "é", "!", ""]
    assert pieces("a", b"x\xc3") == ["x", "", "\N{REPLACEMENT CHARACTER}"]


def test_a_space_after_the_prompt_stays() -> None:
    assert "".join(pieces("one", b" two")) == " two"


@settings(max_examples=40)
@given(prompt=st.text("ab é€", min_size=1, max_size=30).map(lambda text: "x" + text + "y"), text=st.text(max_size=20))
def test_pieces_are_the_text(prompt: str, text: str) -> None:
    assert "".join(pieces(prompt, text.encode())).replace("\N{REPLACEMENT CHARACTER}", "") == text.replace(
        "\N{REPLACEMENT CHARACTER}", ""
    )


def test_texts_are_shown_in_turn() -> None:
    shown: list[str] = []
    texts = OrderedOutput(["A:", "B:", "C:"], shown.append)
    assert shown == ["A:"]
    texts.add(1, "b1")
    texts.add(0, "a1")
    texts.add(2, "c1")
    texts.end(2)
    assert shown == ["A:", "a1"]
    texts.end(0)
    assert shown == ["A:", "a1", "\n", "B:b1"]
    texts.add(1, "b2")
    texts.end(1)
    assert "".join(shown) == "A:a1\nB:b1b2\nC:c1\n"
