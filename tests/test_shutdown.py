"""Signals: one exception, nothing left behind, and an end by force where a library holds the command up."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from fedsplit.shutdown import Stopped, cleaned_up, kill_descendants, stoppable


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_the_exit_code_is_the_shells(number: int, code: int) -> None:
    assert Stopped(number).exit_code == code


def test_a_cleanup_is_made_once_however_the_context_ends() -> None:
    made: list[str] = []
    with cleaned_up(lambda: made.append("well")):
        assert made == []
    with pytest.raises(KeyError), cleaned_up(lambda: made.append("badly")):
        raise KeyError
    assert made == ["well", "badly"]


def test_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stoppable():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_descendants_are_killed_by_the_beginning_of_their_command() -> None:
    call = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(call) as child:
        kill_descendants("ray::")
        assert child.poll() is None
        kill_descendants(sys.executable)
        assert not psutil.pid_exists(child.pid)


COMMAND = """
import subprocess, sys, threading, time
from pathlib import Path
from fedsplit import shutdown
from fedsplit.commands.exit_codes import exit_code

def work():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with shutdown.cleaned_up(lambda: Path(sys.argv[1]).unlink(missing_ok=True)):
        Path(sys.argv[1]).write_text("private")
        print(child.pid, flush=True)
        {wait}

shutdown.GRACE_SECONDS = 1.0
sys.exit(exit_code(work))
"""

WAITS = {
    "a wait that hears": "time.sleep(60)",
    "a library that loses the exception": """while True:
            try:
                time.sleep(60)
            except BaseException:
                pass""",
    "a thread that never ends": "threading.Thread(target=time.sleep, args=(60,)).start(); time.sleep(60)",
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("wait", list(WAITS))
def test_a_command_that_is_stopped_leaves_nothing(wait: str, number: int, tmp_path: Path) -> None:
    private = tmp_path / "private"
    call = [sys.executable, "-c", COMMAND.format(wait=WAITS[wait]), str(private)]
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as command:
        assert command.stdout is not None and command.stderr is not None
        child = psutil.Process(int(command.stdout.readline()))
        assert private.exists()
        command.send_signal(number)
        assert command.wait(timeout=30) == 128 + number
        assert command.stderr.read() == "fedsplit: stopped\n"
    assert not private.exists()
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


class Terminal:
    """A command in a terminal of its own, where Ctrl-C reaches all processes of the foreground."""

    def __init__(self, *argv: str, cwd: Path) -> None:
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.chdir(cwd)
            os.execv(sys.executable, [sys.executable, *argv])
        self.shown = ""

    def read_until(self, words: str, seconds: float) -> None:
        """Reads what is shown until the words are there."""
        self._read(lambda: words in self.shown, seconds)

    def press(self, key: bytes) -> None:
        os.write(self._terminal, key)

    def exit_code(self, seconds: float) -> int:
        """Reads to the end; the exit code."""
        self._read(lambda: False, seconds)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read(self, enough: Callable[[], bool], seconds: float) -> None:
        os.set_blocking(self._terminal, False)
        until = time.monotonic() + seconds
        while not enough():
            if time.monotonic() > until:
                os.kill(self.pid, signal.SIGKILL)
                pytest.fail(f"after {seconds} seconds: {self.shown[-500:]}")
            try:
                data = os.read(self._terminal, 2**16)
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:  # the terminal has no process any more
                return
            else:
                self.shown += data.decode(errors="replace")


RUN = ["--clients", "3", "--rounds", "50", "--train.steps", "4", "--batch-size", "2", "--max-length", "32"]


@pytest.mark.slow
@pytest.mark.parametrize("presses", [1, 2])
@pytest.mark.parametrize("words", ["round 0/50  evaluating", "trained  loss", "round 1/50  evaluating"])
def test_ctrl_c_in_a_terminal_ends_a_run_and_leaves_nothing(words: str, presses: int, tmp_path: Path) -> None:
    terminal = Terminal("-m", "fedsplit.simulate", *RUN, "--eval.samples", "4", "--out", "run", cwd=tmp_path)
    terminal.read_until(words, seconds=240)
    started = psutil.Process(terminal.pid).children(recursive=True)
    assert started and (tmp_path / "run" / "clients" / "data").is_dir()
    for _ in range(presses):
        terminal.press(b"\x03")
    assert terminal.exit_code(seconds=30) == 130
    if presses == 1:  # a second Ctrl-C throws away what the terminal has not shown yet
        assert re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", terminal.shown).strip().endswith("fedsplit: stopped")
    psutil.wait_procs(started, timeout=10)
    assert [process for process in started if process.is_running()] == []
    assert not (tmp_path / "run" / "clients").exists()


@pytest.mark.slow
def test_sigterm_ends_a_run_with_143(tmp_path: Path) -> None:
    call = [sys.executable, "-m", "fedsplit.simulate", *RUN, "--eval.samples", "4", "--out", "run"]
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as run:
        assert run.stdout is not None and run.stderr is not None
        for line in run.stdout:
            if line.startswith("round 1/50"):
                started = psutil.Process(run.pid).children(recursive=True)
                run.terminate()
        assert run.wait(timeout=30) == 143
        assert run.stderr.read() == "fedsplit: stopped\n"
    psutil.wait_procs(started, timeout=10)
    assert [process for process in started if process.is_running()] == []
    assert not (tmp_path / "run" / "clients").exists()
