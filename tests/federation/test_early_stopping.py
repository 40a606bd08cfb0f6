"""Which round is the best, and when patience runs out."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.federation.early_stopping import EarlyStopping


def after(losses: list[float], patience: int = 0, min_delta: float = 0.0) -> EarlyStopping:
    course = EarlyStopping(patience, min_delta)
    for round, loss in enumerate(losses, start=1):
        course.note(round, loss)
    return course


def test_patience_counts_rounds_in_a_row() -> None:
    losses = [3.0, 2.0, 2.5, 1.9, 1.9, 2.0]
    ends = [after(losses[:count], patience=2).is_over for count in range(len(losses) + 1)]
    assert ends == [False] * 6 + [True]
    assert not after(losses).is_over and after(losses).waited == 2
    assert (after(losses).best, after(losses).lowest) == (4, 1.9)
    assert after(losses).reason == "all rounds are done"
    assert after(losses, 2).reason == "2 rounds in a row have not bettered the held-out loss"


def test_what_is_better_by_too_little_does_not_count_but_may_be_the_best() -> None:
    """Small steps add up: the mark stays where it was until they are more than the least difference."""
    course = after([3.0, 2.96, 2.93], patience=2, min_delta=0.1)
    assert (course.waited, course.best, course.is_over, course.is_best) == (2, 3, True, True)
    assert course.reason.endswith("the held-out loss by more than 0.1")
    assert after([3.0, 2.96, 2.89], patience=2, min_delta=0.1).waited == 0


def test_a_loss_that_is_no_number_betters_nothing() -> None:
    course = after([math.nan, math.inf])
    assert (course.best, course.waited) == (1, 2)
    course.note(3, 5.0)
    assert (course.best, course.lowest, course.waited) == (3, 5.0, 0)


def test_a_round_that_changed_nothing_is_no_evidence() -> None:
    """Neither for patience nor as the mark that later losses have to better; it is a round all the same."""
    course = EarlyStopping(patience=2)
    for round in (1, 2, 3):
        course.note(round, 3.0, changed=False)
    assert (course.is_over, course.waited, course.last, course.best) == (False, 0, 3, 1)
    course.note(4, 3.0)
    assert (course.waited, course.mark) == (0, 3.0)
    course.note(5, 3.5)
    course.note(6, 3.5, changed=False)
    assert (course.is_over, course.waited) == (False, 1)
    course.note(7, 3.5)
    assert course.is_over


@given(
    losses=st.lists(st.floats(0, 9) | st.just(math.nan), max_size=12),
    stop=st.integers(0, 12),
    patience=st.integers(0, 3),
    least=st.sampled_from([0.0, 0.5]),
)
def test_a_course_goes_on_from_what_was_saved(losses: list[float], stop: int, patience: int, least: float) -> None:
    again = EarlyStopping(patience, least)
    again.go_on(json.loads(json.dumps(after(losses[:stop], patience, least).document())))
    for round, loss in list(enumerate(losses, start=1))[stop:]:
        again.note(round, loss)
    assert again == after(losses, patience, least)
    numbers = [loss for loss in losses if not math.isnan(loss)]
    assert again.lowest == pytest.approx(min(numbers, default=math.inf))
