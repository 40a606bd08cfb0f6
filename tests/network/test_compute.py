"""Compute times: stated and recorded."""

from __future__ import annotations

import json
import math

import pytest

from fedsplit.errors import SettingError
from fedsplit.network.compute import TASKS, StatedCompute, read_recorded

ONES = dict.fromkeys(TASKS, 1.0)


def test_each_party_has_its_speed() -> None:
    compute = StatedCompute(lambda task, rows, length: float(rows * length), client_speed=2.0, trunk_speed=8.0)
    seconds = {task: compute.seconds(task, rows=2, length=4) for task in TASKS}
    assert {task for task, own in seconds.items() if own == 1.0} == {"trunk-forward", "trunk-backward"}
    assert {own for task, own in seconds.items() if not task.startswith("trunk")} == {4.0}


def test_a_recorded_profile_is_read() -> None:
    compute = read_recorded(json.dumps({"seconds_a_token": ONES | {"top-forward": 2}}))
    assert compute.seconds("top-forward", rows=3, length=5) == 30.0


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (None, "a table seconds_a_token of bottom-forward"),
        ({"top-forward": 1.0}, "a table seconds_a_token of bottom-forward"),
        (ONES | {"more": 1.0}, "a table seconds_a_token of bottom-forward"),
        (ONES | {"top-forward": -1}, "-1 is not possible; allowed: a number of seconds from 0 to 3600"),
        (ONES | {"top-forward": math.inf}, "inf is not possible"),
        (ONES | {"top-forward": "1"}, "1 is not possible"),
    ],
)
def test_a_wrong_profile_is_refused(table: object, words: str) -> None:
    with pytest.raises(SettingError, match=f"^network.compute.*: .*{words}"):
        read_recorded(json.dumps({"seconds_a_token": table}))
