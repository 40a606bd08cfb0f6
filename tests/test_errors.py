"""Errors of what a user gives."""

from __future__ import annotations

import pickle

from fedsplit.errors import SettingError


def test_an_error_survives_the_way_to_another_process() -> None:
    error = pickle.loads(pickle.dumps(SettingError("cut", "9:9", "LO:HI")))
    assert (str(error), error.setting) == ("cut: 9:9 is not possible; allowed: LO:HI", "cut")
