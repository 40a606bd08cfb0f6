"""Seconds of a step, by hand-worked numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedsplit.estimation.duration import Link, StepCost, step_seconds
from fedsplit.network.profiles import Profile

COST = StepCost(
    bottom_forward=1.0,
    trunk_forward=2.0,
    top=3.0,
    trunk_backward=4.0,
    bottom_backward=5.0,
    activation_up=10,
    activation_down=20,
    gradient_up=30,
    gradient_down=40,
)
LINK = Link(up=10.0, down=20.0, delay=0.25)


def test_one_micro_batch_is_the_sum_of_its_way() -> None:
    computing, wire, delays = 15.0, 10 / 10 + 20 / 20 + 30 / 10 + 40 / 20, 4 * 0.25
    assert step_seconds(COST, 1, LINK) == computing + wire + delays
    assert step_seconds(COST, 1, LINK, batches=3, messages=2) == 3 * (computing + wire + delays) + 2 * 0.5


def test_two_micro_batches_overlap_by_hand() -> None:
    """Without a wire: client 0-1-2 forward, trunk 1-3-5, top 3-6-9, trunk 6-10-14, client 10-15 and 15-20."""
    free = replace(COST, activation_up=0, activation_down=0, gradient_up=1e-30, gradient_down=0)
    assert step_seconds(free, 2, Link(1.0, 1.0, 0.0)) == pytest.approx(20.0)


def test_nothing_goes_back_under_forward_only() -> None:
    one_way = replace(COST, gradient_up=0, gradient_down=0, trunk_backward=0.0, bottom_backward=0.0)
    assert step_seconds(one_way, 1, LINK) == 1 + 1 + 2 + 1 + 3 + 2 * 0.25


def test_loss_and_jitter_make_a_line_slower() -> None:
    clean = Link.of(Profile(uplink_mbps=8, downlink_mbps=8, rtt_ms=100))
    assert (clean.up, clean.delay) == (1e6, 0.05)
    worse = Link.of(Profile(uplink_mbps=8, downlink_mbps=8, rtt_ms=100, jitter_ms=20, loss=0.5))
    assert (worse.up, worse.delay) == (5e5, 0.06)
