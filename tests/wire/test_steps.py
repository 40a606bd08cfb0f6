"""What is kept of each client's steps; `test_trunk_states.py` drives it at length."""

from __future__ import annotations

import pytest

from fedsplit.wire.packets import Packet, StepKey
from fedsplit.wire.steps import ExpiredStep, StaleStep, Steps, UnknownStep


def test_a_step_is_pending_then_answered_then_gone() -> None:
    steps: Steps[str] = Steps("", "", 10.0, lambda: 0.0)
    key = StepKey(1, 0, 0)
    with pytest.raises(UnknownStep, match=r"round 1, client 0, step 0\.0, attempt 0"):
        steps.held(key)
    steps.begin(key, "graph")
    assert (steps.held(key), steps.repeated(key), len(steps)) == ("graph", "graph", 1)
    answer = Packet(key)
    steps.answer(key, answer)
    assert steps.answered(key) is answer
    assert len(steps) == 0
    steps.begin(StepKey(1, 0, 1), "next")
    assert steps.answered(key) is None
    with pytest.raises(StaleStep):
        steps.held(key)


def test_beginning_a_step_frees_the_one_before() -> None:
    steps: Steps[str] = Steps("", "", 10.0, lambda: 0.0)
    steps.begin(StepKey(1, 0, 0), "old")
    steps.begin(StepKey(1, 0, 0, micro=1), "old, too")
    steps.begin(StepKey(1, 1, 0), "another client's")
    steps.begin(StepKey(1, 0, 0, attempt=1), "new")
    assert steps.pending() == ["new", "another client's"]
    with pytest.raises(StaleStep):
        steps.begin(StepKey(1, 0, 5), "of the attempt before")


def test_a_repeated_forward_renews_the_lease() -> None:
    now = 0.0
    steps: Steps[str] = Steps("", "", 10.0, lambda: now)
    key = StepKey(1, 0, 0)
    steps.begin(key, "graph")
    now = 9.0
    assert steps.repeated(key) == "graph"
    assert steps.next_expiry() == 19.0
    now = 18.0
    assert steps.expire() == 0
    now = 19.0
    assert steps.expire() == 1
    with pytest.raises(ExpiredStep):
        steps.held(key)
    steps.begin(key, "once more")
    assert steps.held(key) == "once more"
