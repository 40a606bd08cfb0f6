"""Names that settings choose among."""

from __future__ import annotations

from fedsplit.settings import choices
from fedsplit.trunk.schedules import SCHEDULES


def test_the_lists_of_names_are_those_of_the_code() -> None:
    assert tuple(SCHEDULES) == choices.SCHEDULES
