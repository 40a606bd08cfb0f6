"""Completion, by real shells."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
from pathlib import Path

import pytest

from fedsplit.adaptation.methods import ADAPTER_METHODS
from fedsplit.commands import completion
from fedsplit.federation.strategy import builtin_package
from fedsplit.settings.config import SETTINGS
from fedsplit.settings.flags import flag_of


def bash(line: str, cwd: Path) -> set[str]:
    """Completes the last word of a line in bash, by the function that the script registers."""
    words = line.split(" ")
    call = f"{completion.script('bash')}\nCOMP_WORDS=({' '.join(map(repr, words))}) COMP_CWORD={len(words) - 1}\n"
    call += "_shtab_fedsplit\nprintf '%s\\n' \"${COMPREPLY[@]}\""
    done = subprocess.run(["bash", "--norc", "-c", call], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_bash_completes_commands_and_the_flags_of_each(tmp_path: Path) -> None:
    assert bash("fedsplit ev", tmp_path) == {"evaluate"}
    assert bash("fedsplit adapters me", tmp_path) == {"merge"}
    flags = bash("fedsplit simulate --", tmp_path)
    assert {flag_of(name) for name in SETTINGS} | {"--config", "--lr", "--peft"} <= flags
    assert "--plot" in bash("fedsplit data --", tmp_path) and "--clients" in bash("fedsplit data --", tmp_path)
    assert "--run" in bash("fedsplit evaluate --", tmp_path) and "--clients" not in bash(
        "fedsplit evaluate --", tmp_path
    )


@pytest.mark.parametrize("name", ["trunk.schedule", "dtype", "deterministic", "strategy", "lora.method", "partition"])
def test_bash_completes_what_a_setting_may_be(name: str, tmp_path: Path) -> None:
    found = bash(f"fedsplit simulate --clients 2 {flag_of(name)} ", tmp_path)
    assert found and found == set(completion.values_of(name))


def test_values_are_those_that_the_settings_allow() -> None:
    assert completion.values_of("strategy") == sorted(builtin_package().STRATEGIES)
    assert {*ADAPTER_METHODS} < {*completion.values_of("lora.method")}
    for name, setting in SETTINGS.items():
        for text in completion.values_of(name):
            value = {"true": True, "false": False}[text] if setting.python_type is bool else text
            assert setting.allowed.test(value), name
    several = [name for name, setting in SETTINGS.items() if " | " in setting.allowed.words]
    assert several and all(completion.values_of(name) for name in several)


def test_bash_completes_files_folders_and_names(tmp_path: Path) -> None:
    (tmp_path / "notes.jsonl").write_text("{}")
    (tmp_path / "model").mkdir()
    assert bash("fedsplit simulate --dataset ", tmp_path) == {"sotu", "synthetic", "notes.jsonl", "model"}
    assert bash("fedsplit simulate --resume ", tmp_path) == {"model"}
    assert bash("fedsplit simulate --model s", tmp_path) == {"sotu-gpt2"}


ZSH = """
fpath=({folder} $fpath)
autoload -U compinit && compinit -u -d {folder}/dump
zstyle ':completion:*' list-prompt ''
PROMPT='ready> '
"""


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_completes_flags_and_values(tmp_path: Path) -> None:
    """A real zsh on a terminal, in which Tab is pressed."""
    (tmp_path / "_fedsplit").write_text(completion.script("zsh"))
    (tmp_path / ".zshrc").write_text(ZSH.format(folder=tmp_path))
    completed = {
        "fedsplit simulate --trunk.sch": "--trunk.schedule",
        "fedsplit simulate --trunk.schedule forw": "forward-only",
        "fedsplit simulate --dataset synth": "synthetic",
        "fedsplit evalu": "evaluate",
    }
    shown = zsh(list(completed), tmp_path)
    assert [words for words in completed.values() if words not in shown] == []


def zsh(lines: list[str], home: Path) -> str:
    """Returns what a terminal shows where Tab is pressed behind each of some lines."""
    process, terminal = pty.fork()
    if process == 0:
        os.execve(shutil.which("zsh"), ["zsh", "-i"], {"HOME": str(home), "ZDOTDIR": str(home), "TERM": "dumb"})
    try:
        until(terminal, "ready> ")
        for line in [*lines, "exit"]:
            os.write(terminal, f"{line}\t\n".encode())
        return until(terminal, "")
    finally:
        os.close(terminal)
        os.waitpid(process, 0)


def until(terminal: int, words: str) -> str:
    """Reads a terminal until it shows some words, or to its end."""
    shown = ""
    while not words or words not in shown:
        try:
            shown += os.read(terminal, 4096).decode(errors="replace")
        except OSError:  # the shell has ended
            return shown
    return shown
