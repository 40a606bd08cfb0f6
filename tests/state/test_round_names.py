"""Rounds are read off the names of files and folders."""

from __future__ import annotations

from pathlib import Path

from fedsplit.state.round_names import round_file, round_of


def test_rounds_are_read_off_names() -> None:
    names = {"round-0003": 3, "round-12345.safetensors": 12345, "round-x": None, "round-3-old": None, "round-": None}
    assert {name: round_of(Path(name)) for name in names} == names
    assert [round_of(round_file(Path("folds"), round)) for round in (1, 9999, 10000)] == [1, 9999, 10000]
