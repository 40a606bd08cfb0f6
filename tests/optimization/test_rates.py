"""The rate's course is that of transformers' schedulers, step by step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainingArguments, get_scheduler

from fedsplit.optimization.rates import share_of_rate, warmup_steps
from fedsplit.settings.sections import TrainSettings

NAMES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


@given(
    schedule=st.sampled_from(sorted(NAMES)),
    total=st.integers(1, 30),
    warmup=st.integers(0, 40) | st.floats(0, 1, exclude_max=True),
)
def test_every_step_has_the_rate_that_transformers_gives_it(schedule: str, total: int, warmup: float) -> None:
    settings = TrainSettings(schedule=schedule, warmup=float(warmup))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    rise = warmup_steps(settings, total)
    scheduler = get_scheduler(NAMES[schedule], optimizer, num_warmup_steps=rise, num_training_steps=total)
    for step in range(total + 3):  # a client that makes more steps than were foreseen makes them at the last rate
        share = share_of_rate(settings, step, total)
        assert 0 <= share <= 1
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.3 * share, rel=1e-12, abs=1e-15)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(("warmup", "total"), [(0.1, 30), (0.07, 100), (0.5, 3), (0.0, 9), (1.0, 9), (4.0, 9)])
def test_a_share_of_the_steps_is_rounded_as_the_trainer_rounds_it(warmup: float, total: int, tmp_path) -> None:
    theirs = TrainingArguments(str(tmp_path), warmup_steps=warmup, use_cpu=True).get_warmup_steps(total)
    assert warmup_steps(TrainSettings(warmup=warmup), total) == theirs


def test_the_default_is_the_whole_rate_always() -> None:
    assert {share_of_rate(TrainSettings(), step, 7) for step in range(9)} == {1.0}
