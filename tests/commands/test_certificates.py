"""The command that makes certificates for tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsplit.commands.certificates import main
from fedsplit.wire.tls import problem


def test_the_command_says_which_folder_goes_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "set"
    assert main([str(folder), "--clients", "north, south", "--host", "trunk.example", "10.0.0.7", "--days", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("certificates for tests, valid for 3 days")
    assert f"  {folder}/clients/south: to client 1, south" in lines
    for party in ("trunk", "superlink", "federation", "clients/north", "clients/south"):
        assert f"  {folder}/{party}: " in "\n".join(lines)
        assert problem(folder / party) == ""


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--clients", "a,a"], "clients: a is not possible; allowed: each name once"),
        (["--clients", "a,../b"], "clients: ../b is not possible; allowed: letters, digits, - and _ in each name"),
        (["--clients", ""], "clients: nothing is not possible"),
        (["--clients", "federation"], "clients: federation is not possible"),
        (["--clients", "x" * 64], "is not possible; allowed: letters, digits"),
        (["--clients", "a", "--days", "0"], "days: 0 is not possible; allowed: a whole number from 1 to 3650"),
        (["--clients", "a", "--days", "two"], "argument --days: invalid int value"),
        (["--clients", "a", "--host", "x y"], "host: x y is not possible; allowed: the name or the address"),
        ([], "--clients"),
    ],
    ids=["twice", "path", "empty", "federation", "long", "no-days", "word", "host", "missing"],
)
def test_wrong_arguments_are_told_in_a_line_and_nothing_is_written(
    flags: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "set"), *flags]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("fedsplit: ") and line in errors[0]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_in_use_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("mine")
    assert main([str(tmp_path), "--clients", "a"]) == 2
    assert "allowed: a folder that does not exist yet, or an empty one" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
