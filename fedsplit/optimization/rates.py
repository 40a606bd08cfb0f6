"""The learning rate's course over the steps of a whole run, as a client counts them."""

from __future__ import annotations

import math

from fedsplit.settings.sections import TrainSettings


def warmup_steps(settings: TrainSettings, total: int) -> int:
    """Over how many of `total` steps the rate rises; a share of them is rounded up, as transformers' Trainer does."""
    return int(settings.warmup) if settings.warmup >= 1 else math.ceil(total * settings.warmup)


def share_of_rate(settings: TrainSettings, step: int, total: int) -> float:
    """Which share of the learning rate a step is made at.

    The formulas are those of transformers' `get_scheduler`: after a rise from 0, the rate stays ("constant"), falls to
    0 along a line ("linear") or along half a cosine ("cosine", 1608.03983 without its restarts).

    Args:
        settings: Which course, and the warm-up.
        step: The client's steps before this one, over all rounds.
        total: Its steps in all rounds.

    Returns:
        A number in [0, 1].
    """
    rise = warmup_steps(settings, total)
    if step < rise:
        return step / rise
    if settings.schedule == "linear":
        return max(0.0, (total - step) / max(1, total - rise))
    if settings.schedule == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((step - rise) / max(1, total - rise)))))
    return 1.0


def last_rate(settings: TrainSettings, steps: int, round: int, rounds: int) -> float:
    """Returns the learning rate of a client's last local step of a round.

    Args:
        settings: Settings of the training.
        steps: The client's local steps in a round.
        round: Number of the round, from 1.
        rounds: Rounds of the run.

    Example:
        >>> last_rate(TrainSettings(lr=0.01, schedule="linear"), steps=10, round=1, rounds=2)
        0.0055000000000000005
    """
    return settings.lr * share_of_rate(settings, round * steps - 1, rounds * steps)
