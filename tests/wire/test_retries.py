"""Patience: time counts from the first broken stream on, and progress begins it anew."""

from __future__ import annotations

from fedsplit.wire.retries import Patience


class Scene:
    def __init__(self) -> None:
        self.now = 0.0
        self.patience = Patience(60.0, lambda: self.now)


def test_time_counts_from_the_first_break_and_not_from_the_begin() -> None:
    scene = Scene()
    scene.now = 1000.0
    assert not scene.patience.is_over()
    scene.now = 1059.0
    assert not scene.patience.is_over()
    scene.now = 1060.0
    assert scene.patience.is_over()


def test_an_answer_begins_the_time_anew_and_a_short_stream_does_not() -> None:
    scene = Scene()
    assert not scene.patience.is_over()
    scene.now = 59.0
    scene.patience.began()
    scene.now = 61.0
    assert scene.patience.is_over()
    scene.patience.progressed()
    assert not scene.patience.is_over()


def test_a_stream_that_lives_long_is_progress() -> None:
    """A trunk that computes for minutes has answered nothing before its stream breaks."""
    scene = Scene()
    assert not scene.patience.is_over()
    scene.patience.began()
    scene.now = 100.0
    assert not scene.patience.is_over()
    scene.now = 160.0
    assert scene.patience.is_over()


def test_waits_grow_up_to_a_limit_and_differ() -> None:
    patience = Patience(60.0)
    waits = [patience.wait() for _ in range(12)]
    assert 0.025 <= waits[0] <= 0.05 and all(1.0 <= wait <= 2.0 for wait in waits[7:])
    assert len(set(waits)) == len(waits)
    patience.progressed()
    assert patience.wait() <= 0.05
