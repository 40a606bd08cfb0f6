"""A clock that tests move by hand."""

from __future__ import annotations

from fedsplit.clock import ManualClock


def test_a_manual_clock_moves_forward_only() -> None:
    clock = ManualClock(1.0)
    assert clock() == 1.0
    clock.advance_to(3.0)
    clock.advance_to(2.0)
    assert clock() == 3.0
