"""Which token comes next: by hand, and against how often it should."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.generation.sampling import Chooser, Sampling

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


def _draw(how: Sampling, count: int = 400) -> list[int]:
    choose = Chooser(how, [0])
    return [int(choose(LOGITS[None])) for _ in range(count)]


def test_the_likeliest_without_a_temperature() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]], dtype=torch.bfloat16)
    assert Chooser(Sampling(), [0, 1])(logits).tolist() == [1, 0]


def test_how_many_are_drawn_among() -> None:
    assert set(_draw(Sampling(1.0))) == {0, 1, 2, 3}
    assert set(_draw(Sampling(1.0, top_k=2))) == {0, 1}
    assert set(_draw(Sampling(1.0, top_p=0.79))) == {0, 1}
    assert set(_draw(Sampling(1.0, top_p=0.81))) == {0, 1, 2}
    assert set(_draw(Sampling(0.01))) == {0}


def test_temperature_is_what_logits_are_divided_by() -> None:
    """At 2, odds are the roots of what they were."""
    roots = torch.tensor([0.5, 0.3, 0.15, 0.05]).sqrt()
    expected, count = roots / roots.sum(), 4000
    found = torch.bincount(torch.tensor(_draw(Sampling(2.0), count)), minlength=4) / count
    assert (found - expected).abs().max() < 5 * math.sqrt(0.25 / count)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), number=st.integers(0, 99))
def test_a_text_draws_the_same_whatever_is_beside_it(seed: int, number: int) -> None:
    how = Sampling(1.5, seed=seed)
    alone, together = Chooser(how, [number]), Chooser(how, [number + 1, number])
    rows = LOGITS.repeat(2, 1)
    found = [(int(alone(LOGITS[None])), together(rows).tolist()) for _ in range(20)]
    assert all(one == both[1] for one, both in found)


def test_texts_of_one_run_draw_differently_and_seeds_too() -> None:
    rows = LOGITS.repeat(2, 1)
    choose = Chooser(Sampling(1.0), [0, 1])
    first, second = zip(*(choose(rows).tolist() for _ in range(50)), strict=True)
    assert first != second
    assert _draw(Sampling(1.0, seed=1), 50) != _draw(Sampling(1.0, seed=2), 50)
    assert _draw(Sampling(1.0, seed=1), 50) == _draw(Sampling(1.0, seed=1), 50)
