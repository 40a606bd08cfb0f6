"""One command for all commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fedsplit
from fedsplit import __main__ as command
from fedsplit.commands import module_of, simulate


def test_help_lists_every_command_and_each_has_a_main(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == command.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name in command.COMMANDS:
        assert f"\n  {name} " in shown
        imported = f"import sys, {module_of(name)} as module"
        code = f"{imported}; sys.exit(not callable(module.main) or 'torch' in sys.modules)"
        subprocess.run([sys.executable, "-c", code], check=True)


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fedsplit {fedsplit.__version__}\n"


def test_what_follows_a_command_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags without a command are simulate's, which the command stood for once."""
    seen: list[list[str]] = []
    monkeypatch.setattr(simulate, "main", lambda argv: seen.append(argv) or 3)
    assert command.main(["simulate", "--clients", "2"]) == 3
    assert command.main(["--clients", "2"]) == 3
    assert seen == [["--clients", "2"], ["--clients", "2"]]


def test_an_unknown_command_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["generrate"]) == 2
    assert capsys.readouterr().err == "fedsplit: there is no command generrate; did you mean generate?\n"


def test_help_and_version_load_no_library(tmp_path: Path) -> None:
    code = (
        "import sys; from fedsplit.__main__ import main; main(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'peft', 'ray', 'flwr', 'datasets', 'numpy', 'rich'} & sys.modules.keys()\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    for argv in (["--help"], ["--version"], ["completion", "zsh"]):
        done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout


def test_a_command_leaves_with_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(command, "listen", lambda: codes.append(-1))
    monkeypatch.setattr(command, "leave", codes.append)
    monkeypatch.setattr(sys, "argv", ["fedsplit", "simulat"])
    command.command()
    assert codes == [-1, 2]
