"""The learning rate's course over the steps of a whole run, as a client counts them."""

from __future__ import annotations

import math

from fedsplit.config import TrainSettings


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
