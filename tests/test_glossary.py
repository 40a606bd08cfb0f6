"""The glossary: every word once, and each in use in the file that is said to own it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROW = re.compile(r"\| ([^|]+) \| (.+) \| `([\w/.]+)` \|")
ROWS = [match.groups() for match in map(ROW.fullmatch, Path("docs/glossary.md").read_text().splitlines()) if match]


def test_every_row_is_read() -> None:
    lines = Path("docs/glossary.md").read_text().splitlines()
    cells = [line for line in lines if line.startswith("| ") and not line.startswith("| word")]
    assert len(ROWS) == len(cells) > 40


def test_no_word_is_defined_twice() -> None:
    words = [word for word, _, _ in ROWS]
    assert len(words) == len(set(words))


@pytest.mark.parametrize(("word", "meaning", "file"), ROWS, ids=[word for word, _, _ in ROWS])
def test_the_file_that_owns_a_word_uses_it(word: str, meaning: str, file: str) -> None:
    assert Path(file).is_file()
    text = re.sub(r"[\s_-]+", " ", f"{file} {Path(file).read_text()}".lower())
    assert word.replace("-", " ") in text
    assert meaning.endswith((".", ".)"))
    assert meaning.count(". ") <= 1  # one sentence, and a note in brackets at most
