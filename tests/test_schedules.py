"""The switch: what each schedule makes of a step."""

from __future__ import annotations

import pytest

from fedsplit.schedules import SCHEDULES


@pytest.mark.parametrize(
    ("name", "with_bottom", "without_bottom"),
    [("shared", True, True), ("frozen", True, False), ("forward-only", False, False)],
)
def test_who_waits_for_a_backward(name: str, with_bottom: bool, without_bottom: bool) -> None:
    assert SCHEDULES[name].expects_backward(wants_gradient=True) == with_bottom
    assert SCHEDULES[name].expects_backward(wants_gradient=False) == without_bottom
