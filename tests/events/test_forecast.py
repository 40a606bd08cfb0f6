"""The time that is left: rounds so far, carried on."""

from __future__ import annotations

from fedsplit.events import Progress
from fedsplit.events.forecast import Forecast


def seen(forecast: Forecast, round: int, now: float, rounds: int = 5) -> None:
    forecast.see(Progress(phase="training", round=round, rounds=rounds, done=0, of=8), now)


def test_nothing_is_known_before_a_round_is_over() -> None:
    forecast = Forecast()
    assert forecast.seconds_left(0.0) is None
    seen(forecast, 0, 1.0)  # loading, and the evaluation before training
    seen(forecast, 1, 100.0)
    assert forecast.seconds_left(150.0) is None


def test_rounds_to_come_take_as_long_as_rounds_so_far() -> None:
    forecast = Forecast()
    seen(forecast, 1, 100.0)
    seen(forecast, 2, 110.0)
    assert forecast.seconds_left(110.0) == 4 * 10
    assert forecast.seconds_left(115.0) == 4 * 10 - 5
    seen(forecast, 2, 118.0)  # more news of the same round
    seen(forecast, 3, 130.0)  # 15 seconds a round by now
    assert forecast.seconds_left(130.0) == 3 * 15
    assert forecast.seconds_left(1000.0) == 0


def test_a_run_that_goes_on_counts_its_own_rounds_alone() -> None:
    forecast = Forecast()
    seen(forecast, 4, 10.0)
    assert forecast.seconds_left(11.0) is None
    seen(forecast, 5, 14.0)
    assert forecast.seconds_left(14.0) == 4
