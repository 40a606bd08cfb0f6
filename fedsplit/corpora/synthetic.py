"""A small language that is made from the seed: nothing is downloaded, and what can be learned of it is known.

Words are made of syllables. A sentence is `DET ADJECTIVE NOUN VERB DET NOUN .`, and three rules decide it:

- **Grammar**, the same for all owners: each noun is of one of two genders, which determiner and adjective agree with
  by their first and last syllable. A model learns it from anybody's text.
- **Topics**: a noun belongs to one of four topics, and a text keeps to the nouns of its own, which is its `label`.
  Owners differ in the topics that they write about, by a Dirichlet draw with alpha 0.5: label skew.
- **Habits**: which noun an owner lets follow a verb in a text of a topic is a fixed choice of the owner's. Of two
  owners each learns what contradicts the other: what is one's own is lost in an average.

The last sentence of a text is also a question, up to its verb, and an answer: `prompt` and `completion`, and as a chat
`messages`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedsplit.seeds import derive_seed

TOPICS = ("weather", "market", "harbour", "garden")
"""The labels; the words of a topic are made up."""

TEXTS = 32
"""Texts of an owner."""

SENTENCES = 24
"""Sentences of a text."""

_SKEW = 0.5
_NOUNS, _VERBS, _ADJECTIVES = 6, 8, 6
_ONSETS, _VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclass(frozen=True)
class Language:
    """The words that all owners have in common.

    Attributes:
        determiners: One for each gender.
        adjectives: Stems; the gender's ending is put after them.
        endings: One for each gender.
        verbs: Whole words.
        nouns: By topic, each with its gender, 0 or 1.
    """

    determiners: tuple[str, str]
    adjectives: tuple[str, ...]
    endings: tuple[str, str]
    verbs: tuple[str, ...]
    nouns: tuple[tuple[tuple[str, int], ...], ...]

    def phrase(self, noun: tuple[str, int], adjective: str = "") -> str:
        """A noun with what agrees with it."""
        word, gender = noun
        middle = f"{adjective}{self.endings[gender]} " if adjective else ""
        return f"{self.determiners[gender]} {middle}{word}"


def make_language(seed: int) -> Language:
    """Draws the words; no two are equal."""
    draw = random.Random(derive_seed(seed, "synthetic", "words"))
    syllables = ["".join(pair) for pair in itertools.product(_ONSETS, _VOWELS)]
    pairs = ["".join(pair) for pair in itertools.permutations(syllables, 2)]
    words = iter(draw.sample(pairs, _ADJECTIVES + _VERBS + _NOUNS * len(TOPICS)))
    short = draw.sample(syllables, 4)
    adjectives = tuple(itertools.islice(words, _ADJECTIVES))
    verbs = tuple(itertools.islice(words, _VERBS))
    nouns = tuple(tuple((next(words), number % 2) for number in range(_NOUNS)) for _ in TOPICS)
    return Language((short[0], short[1]), adjectives, (short[2], short[3]), verbs, nouns)


def _topic_shares(draw: random.Random) -> list[float]:
    """A Dirichlet draw, by its gamma variables."""
    weights = [draw.gammavariate(_SKEW, 1.0) + 1e-9 for _ in TOPICS]
    return [weight / sum(weights) for weight in weights]


def make_rows(seed: int, owners: int) -> list[dict[str, Any]]:
    """Texts of some owners; those of an owner do not depend on how many there are.

    Args:
        seed: The run's seed.
        owners: How many.

    Returns:
        Rows with `text`, `owner`, `label`, `prompt`, `completion` and `messages`, owner by owner.
    """
    language = make_language(seed)
    rows: list[dict[str, Any]] = []
    for owner in range(owners):
        draw = random.Random(derive_seed(seed, "synthetic", "owner", owner))
        shares = _topic_shares(draw)
        habits = [[draw.randrange(_NOUNS) for _ in language.verbs] for _ in TOPICS]
        for _ in range(TEXTS):
            topic = draw.choices(range(len(TOPICS)), shares)[0]
            rows.append({"owner": f"owner {owner}", "label": TOPICS[topic]} | _text(language, topic, habits, draw))
    return rows


def _text(language: Language, topic: int, habits: Sequence[Sequence[int]], draw: random.Random) -> dict[str, Any]:
    nouns, told = language.nouns[topic], []
    for _ in range(SENTENCES):
        verb, subject = draw.randrange(_VERBS), draw.choice(nouns)
        first = language.phrase(subject, draw.choice(language.adjectives))
        told.append((f"{first} {language.verbs[verb]}", language.phrase(nouns[habits[topic][verb]])))
    text = " ".join(f"{question} {answer}." for question, answer in told)
    question, answer = told[-1]
    completion = f" {answer}."
    chat = [{"role": "user", "content": f"{question}?"}, {"role": "assistant", "content": f"{answer}."}]
    return {"text": text, "prompt": question, "completion": completion, "messages": chat}
