"""Schedules of the learning rate, over the steps of a client in the whole run."""

from __future__ import annotations

import math

from fedsplit.settings.sections import TrainSettings


def warmup_steps(settings: TrainSettings, total: int) -> int:
    """Returns the number of steps with a rising rate.

    Args:
        settings: Settings with the warm-up, as a number of steps or as a share of all steps.
        total: Number of all steps. A share is rounded up, as in transformers' Trainer.

    Example:
        >>> warmup_steps(TrainSettings(warmup=0.25), total=10), warmup_steps(TrainSettings(warmup=5), total=10)
        (3, 5)
    """
    if settings.warmup >= 1:
        return int(settings.warmup)
    return math.ceil(total * settings.warmup)


def share_of_rate(settings: TrainSettings, step: int, total: int) -> float:
    """Returns the share of the learning rate for a step.

    The formulas are transformers' `get_scheduler`: after a rise from 0, the rate stays ("constant"), falls to 0 along a
    line ("linear") or along half a cosine ("cosine", 1608.03983 without restarts).

    Args:
        settings: Settings with the schedule and the warm-up.
        step: Number of the client's earlier steps, over all rounds.
        total: Number of the client's steps in all rounds.

    Returns:
        A number in [0, 1].

    Example:
        >>> settings = TrainSettings(schedule="linear", warmup=2)
        >>> [share_of_rate(settings, step, total=6) for step in range(6)]
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]
    """
    rise = warmup_steps(settings, total)
    if step < rise:
        return step / rise
    fall = max(1, total - rise)  # 1, so that a run of warm-up alone divides by no zero
    if settings.schedule == "linear":
        return max(0.0, (total - step) / fall)
    if settings.schedule == "cosine":
        progress = (step - rise) / fall
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    return 1.0


def last_rate(settings: TrainSettings, steps: int, round: int, rounds: int) -> float:
    """Returns the learning rate of a client's last local step of a round.

    Args:
        settings: Settings with the rate, the schedule and the warm-up.
        steps: Number of the client's steps in a round.
        round: Number of the round, from 1.
        rounds: Rounds of the run.

    Example:
        >>> last_rate(TrainSettings(lr=0.01, schedule="linear"), steps=10, round=1, rounds=2)
        0.0055000000000000005
    """
    return settings.lr * share_of_rate(settings, round * steps - 1, rounds * steps)
