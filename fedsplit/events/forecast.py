"""Estimates the time that is left of a run."""

from __future__ import annotations

from fedsplit.events.event_types import Progress


class Forecast:
    """Estimates the time that is left of a run, from the rounds so far.

    Example:
        >>> forecast = Forecast()
        >>> forecast.see(Progress(phase="training", round=1, rounds=3, done=0, of=8), now=100.0)
        >>> forecast.seconds_left(now=110.0) is None  # nothing is known yet
        True
        >>> forecast.see(Progress(phase="training", round=2, rounds=3, done=0, of=8), now=140.0)
        >>> forecast.seconds_left(now=150.0)
        70.0
    """

    def __init__(self) -> None:
        """Starts before the first round."""
        self._round = 0
        self._rounds = 0
        self._began = 0.0  # the present round
        self._first = 0  # the first round seen, and its beginning; a resumed run starts late
        self._first_began = 0.0

    def see(self, event: Progress, now: float) -> None:
        """Takes the progress of a run at a time in seconds."""
        # Round 0 trains nothing, so that its time says little about the rounds that are left.
        if event.round == 0 or event.round == self._round:
            return
        if self._first == 0:
            self._first = event.round
            self._first_began = now
        self._round = event.round
        self._rounds = event.rounds
        self._began = now

    def seconds_left(self, now: float) -> float | None:
        """Returns the seconds that are left at a time; None before the first round is over."""
        done = self._round - self._first
        if done < 1:
            return None
        seconds_a_round = (self._began - self._first_began) / done
        # The present round is one of them, since its time counts from its beginning.
        rounds_left = self._rounds - self._round + 1
        return max(0.0, self._began + rounds_left * seconds_a_round - now)
