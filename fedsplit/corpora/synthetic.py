"""A synthetic language, made from the seed. No download is needed, and all regularities of the language are known.

Words are made of syllables. A sentence is `DET ADJECTIVE NOUN VERB DET NOUN .`, and follows three rules:

- **Grammar**, shared by all owners: each noun has one of two genders. The determiner and the adjective agree with the
  gender by their first and last syllable. A model learns the grammar from any owner's text.
- **Topics**: each noun belongs to one of four topics. A text uses the nouns of one topic, which is its `label`. Owners
  prefer different topics, by a Dirichlet draw with alpha 0.5: label skew.
- **Habits**: each owner always lets the same noun follow a verb in texts of a topic. The habits of two owners
  contradict each other, so that an average of their models loses both.

The last sentence of a text also serves as a question, up to its verb, and an answer: as `prompt` and `completion`, and
as a chat in `messages`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedsplit.seeds import derive_seed

TOPICS = ("weather", "market", "harbour", "garden")
"""Labels of the texts. The words of a topic are made up, too."""

TEXTS = 32
"""Number of texts of an owner."""

SENTENCES = 24
"""Number of sentences in a text."""

_SKEW = 0.5
"""Alpha of the Dirichlet draw of an owner's topics."""

_NOUNS = 6
"""Number of nouns of a topic."""

_VERBS = 8
_ADJECTIVES = 6
_ONSETS = "bdfgklmnprstvz"
_VOWELS = "aeiou"


@dataclass(frozen=True)
class Language:
    """The vocabulary that all owners share.

    Attributes:
        determiners: Determiner of each gender.
        adjectives: Stems of the adjectives, to which the ending of a gender is added.
        endings: Ending of each gender.
        verbs: The verbs.
        nouns: Nouns of each topic, each with its gender, 0 or 1.
    """

    determiners: tuple[str, str]
    adjectives: tuple[str, ...]
    endings: tuple[str, str]
    verbs: tuple[str, ...]
    nouns: tuple[tuple[tuple[str, int], ...], ...]

    def phrase(self, noun: tuple[str, int], adjective: str = "") -> str:
        """Returns a noun with a determiner and, if given, an adjective, all of the noun's gender.

        Example:
            >>> language = Language(("da", "di"), ("kum",), ("a", "i"), ("solt",), ())
            >>> language.phrase(("bino", 1), adjective="kum")
            'di kumi bino'
        """
        word, gender = noun
        determiner = self.determiners[gender]
        if not adjective:
            return f"{determiner} {word}"
        return f"{determiner} {adjective}{self.endings[gender]} {word}"


def make_language(seed: int) -> Language:
    """Draws the vocabulary. No two words are equal."""
    draw = random.Random(derive_seed(seed, "synthetic", "words"))
    syllables = ["".join(pair) for pair in itertools.product(_ONSETS, _VOWELS)]
    pairs = ["".join(pair) for pair in itertools.permutations(syllables, 2)]
    # One sample for all kinds of words, so that no word is drawn twice.
    words = iter(draw.sample(pairs, _ADJECTIVES + _VERBS + _NOUNS * len(TOPICS)))
    first_determiner, second_determiner, first_ending, second_ending = draw.sample(syllables, 4)
    adjectives = tuple(itertools.islice(words, _ADJECTIVES))
    verbs = tuple(itertools.islice(words, _VERBS))
    nouns = []
    for _ in TOPICS:
        nouns.append(tuple((next(words), number % 2) for number in range(_NOUNS)))  # the genders alternate
    return Language(
        determiners=(first_determiner, second_determiner),
        adjectives=adjectives,
        endings=(first_ending, second_ending),
        verbs=verbs,
        nouns=tuple(nouns),
    )


def _topic_shares(draw: random.Random) -> list[float]:
    """Returns a Dirichlet draw over the topics, as normalised gamma variables."""
    weights = [draw.gammavariate(_SKEW, 1.0) + 1e-9 for _ in TOPICS]  # all may underflow to 0
    total = sum(weights)
    return [weight / total for weight in weights]


def make_rows(seed: int, owners: int) -> list[dict[str, Any]]:
    """Writes the texts of some owners. An owner's texts do not depend on the number of owners.

    Args:
        seed: Seed of the run.
        owners: Number of owners.

    Returns:
        Rows with `text`, `owner`, `label`, `prompt`, `completion`, `chosen`, `rejected` and `messages`, owner by owner.

    Example:
        >>> rows = make_rows(seed=0, owners=2)
        >>> len(rows), sorted(rows[0])
        (64, ['chosen', 'completion', 'label', 'messages', 'owner', 'prompt', 'rejected', 'text'])
        >>> rows[0]["text"].endswith(rows[0]["prompt"] + rows[0]["completion"])
        True
    """
    language = make_language(seed)
    rows: list[dict[str, Any]] = []
    for owner in range(owners):
        draw = random.Random(derive_seed(seed, "synthetic", "owner", owner))
        shares = _topic_shares(draw)
        habits = [[draw.randrange(_NOUNS) for _ in language.verbs] for _ in TOPICS]
        for _ in range(TEXTS):
            topic = draw.choices(range(len(TOPICS)), shares)[0]
            text = _text(language, topic, habits, draw)
            rows.append({"owner": f"owner {owner}", "label": TOPICS[topic], **text})
    return rows


def _text(
    language: Language,
    topic: int,
    habits: Sequence[Sequence[int]],
    draw: random.Random,
) -> dict[str, Any]:
    """Writes a text.

    Args:
        language: The vocabulary.
        topic: Number of the text's topic.
        habits: The owner's noun after each verb, by topic and verb.
        draw: Source of all draws.
    """
    nouns = language.nouns[topic]
    sentences = []
    for _ in range(SENTENCES):
        verb = draw.randrange(_VERBS)
        subject = language.phrase(draw.choice(nouns), draw.choice(language.adjectives))
        object_ = language.phrase(nouns[habits[topic][verb]])
        sentences.append((f"{subject} {language.verbs[verb]}", object_))
        other = language.phrase(nouns[(habits[topic][verb] + 1) % _NOUNS])  # no habit of the owner's

    question, answer = sentences[-1]
    return {
        "text": " ".join(f"{start} {end}." for start, end in sentences),
        "prompt": question,
        "completion": f" {answer}.",
        "chosen": f" {answer}.",
        "rejected": f" {other}.",
        "messages": [
            {"role": "user", "content": f"{question}?"},
            {"role": "assistant", "content": f"{answer}."},
        ],
    }
