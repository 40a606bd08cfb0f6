"""The switch: what each schedule makes of a step."""

from __future__ import annotations

import pytest

from fedsplit.settings import choices
from fedsplit.trunk.schedules import SCHEDULES, is_deterministic


@pytest.mark.parametrize(
    ("name", "with_bottom", "without_bottom"),
    [
        ("shared", True, True),
        ("batched", True, True),
        ("accumulate", True, True),
        ("copies", True, True),
        ("frozen", True, False),
        ("forward-only", False, False),
    ],
)
def test_who_waits_for_a_backward(name: str, with_bottom: bool, without_bottom: bool) -> None:
    assert SCHEDULES[name].expects_backward(wants_gradient=True) == with_bottom
    assert SCHEDULES[name].expects_backward(wants_gradient=False) == without_bottom


def test_the_settings_know_all_schedules() -> None:
    assert set(choices.SCHEDULES) == set(SCHEDULES)


def test_which_results_do_not_depend_on_who_comes_first() -> None:
    declared = {(name, every) for name in SCHEDULES for every in (0, 2) if is_deterministic(name, every)}
    always = {(name, every) for name in ("copies", "frozen", "forward-only") for every in (0, 2)}
    assert declared == always | {("accumulate", 0)}
