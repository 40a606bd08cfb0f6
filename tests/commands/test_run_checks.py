"""The order of a run's checks; tests/commands/test_checks.py has what a user may get wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsplit.commands import run_checks
from fedsplit.errors import InputError
from fedsplit.settings.documents import build, draft


def test_the_data_are_read_only_if_no_setting_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_early(*_: object) -> None:
        raise AssertionError("the data were read")

    monkeypatch.setattr("fedsplit.corpora.partition.partition_of", too_early)
    wrong = {"cut": "1:7", "trunk.every": 2, "out": str(tmp_path / "run")}
    with pytest.raises(InputError) as refused:
        run_checks.check(build(wrong))
    assert [str(error).partition(":")[0] for error in refused.value.errors] == ["trunk.every", "cut"]


def test_a_draft_with_errors_is_checked_as_far_as_its_settings_are_valid(tmp_path: Path) -> None:
    wrong = draft({"clients": "x", "cut": "1:7", "strategy": "fedavgg", "out": str(tmp_path / "run")}, {})
    with pytest.raises(InputError) as refused:
        run_checks.checked(wrong)
    assert [str(error).partition(":")[0] for error in refused.value.errors] == ["clients", "cut", "strategy"]
    assert run_checks.checked(draft({"cut": "1:7"}, {})).cut == "1:7"  # `check` is still to be called
