"""Sections of a page."""

from __future__ import annotations

from fedsplit.reporting.content import Passage, Section


def test_a_section_with_nothing_but_words_is_empty() -> None:
    assert Section("Loss", "An introduction.").is_empty
    assert not Section("Text", passages=[Passage("before", "x")]).is_empty
