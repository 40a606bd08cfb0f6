"""Errors of what a user gives."""

from __future__ import annotations

import pickle

from fedsplit.errors import SettingError, one_line


def test_an_error_survives_the_way_to_another_process() -> None:
    error = pickle.loads(pickle.dumps(SettingError("cut", "9:9", "LO:HI")))
    assert (str(error), error.setting) == ("cut: 9:9 is not possible; allowed: LO:HI", "cut")


def test_an_error_is_told_in_one_line() -> None:
    assert one_line(ValueError("announced:\n  the reason\nmore")) == "announced: the reason"
    assert one_line(ValueError("")) == "ValueError"
