"""The synthetic language: its rules hold, it can be learned, and its owners differ."""

from __future__ import annotations

from collections import Counter

import pytest

from fedsplit.corpora.synthetic import SENTENCES, TEXTS, TOPICS, make_language, make_rows


def test_it_follows_from_the_seed_and_owners_do_not_depend_on_how_many_there_are() -> None:
    assert make_rows(3, 4) == make_rows(3, 4)
    assert make_rows(3, 2) == make_rows(3, 4)[: 2 * TEXTS]
    assert make_rows(3, 1) != make_rows(4, 1)


@pytest.mark.parametrize("seed", [0, 1])
def test_every_sentence_follows_the_grammar(seed: int) -> None:
    language = make_language(seed)
    genders = {word: gender for nouns in language.nouns for word, gender in nouns}
    topics = {word: topic for topic, nouns in zip(TOPICS, language.nouns, strict=True) for word, _ in nouns}
    assert len(genders) == sum(map(len, language.nouns))
    for row in make_rows(seed, 3):
        sentences = [sentence.split() for sentence in row["text"].rstrip(".").split(". ")]
        assert len(sentences) == SENTENCES
        for first, adjective, subject, verb, second, other in sentences:
            assert verb in language.verbs
            assert topics[subject] == topics[other] == row["label"]
            assert adjective.endswith(language.endings[genders[subject]])
            assert first == language.determiners[genders[subject]] and second == language.determiners[genders[other]]
        assert row["text"].endswith(row["prompt"] + row["completion"])
        assert [turn["content"] for turn in row["messages"]] == [f"{row['prompt']}?", row["completion"].strip()]


def test_owners_write_about_other_topics_and_have_habits_that_contradict() -> None:
    rows = make_rows(0, 6)
    topics = {
        owner: Counter(row["label"] for row in rows if row["owner"] == owner) for owner in {r["owner"] for r in rows}
    }
    assert max(counts.most_common(1)[0][1] for counts in topics.values()) > TEXTS // 2
    assert len({counts.most_common(1)[0][0] for counts in topics.values()}) > 1
    follows: dict[tuple[str, str, str], set[str]] = {}
    for row in rows:
        for sentence in row["text"].rstrip(".").split(". "):
            _, _, _, verb, _, other = sentence.split()
            follows.setdefault((row["owner"], row["label"], verb), set()).add(other)
    assert all(len(nouns) == 1 for nouns in follows.values())
    assert len({next(iter(nouns)) for (_, topic, _), nouns in follows.items() if topic == TOPICS[0]}) > 1
    by_habit: dict[tuple[str, str], set[str]] = {}
    for (_, topic, verb), nouns in follows.items():
        by_habit.setdefault((topic, verb), set()).update(nouns)
    assert sum(len(nouns) > 1 for nouns in by_habit.values()) > len(by_habit) // 2
