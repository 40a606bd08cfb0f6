"""Signals: one exception, nothing left behind, and an end by force where a library holds the command up."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import fedsplit
from fedsplit.shutdown import Stopped, advised, bounded, cleaned_up, kill_descendants, stoppable


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
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


def test_a_second_signal_ends_a_command_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    """The orderly end would never come, and the end by force only after minutes."""
    private = tmp_path / "private"
    script = COMMAND.format(wait=WAITS["a library that loses the exception"]).replace("1.0", "600.0")
    call = [sys.executable, "-c", script, str(private)]
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as command:
        assert command.stdout is not None and command.stderr is not None
        child = psutil.Process(int(command.stdout.readline()))
        for _ in range(2):
            command.terminate()
            time.sleep(0.5)  # else both would be one signal
        assert command.wait(timeout=30) == 143
        assert command.stderr.read() == "fedsplit: stopped\n"
    assert not private.exists()
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_a_closed_terminal_is_ignored_under_nohup(tmp_path: Path) -> None:
    script = COMMAND.format(wait="signal.raise_signal(signal.SIGHUP); print('goes on'); child.kill()").replace(
        "import", "import signal,", 1
    )
    call = ["nohup", sys.executable, "-c", script, str(tmp_path / "private")]
    done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, timeout=60, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout.splitlines()[1:]) == (0, ["goes on"])


def test_advice_is_that_of_the_innermost_context() -> None:
    with pytest.raises(Stopped) as caught, advised(lambda: "outer"), advised(lambda: "inner"):
        raise Stopped(signal.SIGTERM)
    assert caught.value.reason == "stopped; inner"
    asked: list[str] = []
    with pytest.raises(KeyError), advised(lambda: asked.append("in vain") or ""):
        raise KeyError
    assert asked == []


def test_an_error_has_advice_of_its_own() -> None:
    with pytest.raises(KeyError) as caught, advised(lambda: "stopped", after_error=lambda: "go on"):
        raise KeyError
    assert caught.value.__notes__ == ["go on"]
    with pytest.raises(KeyError) as caught, advised(lambda: "stopped", after_error=lambda: ""):
        raise KeyError
    assert not hasattr(caught.value, "__notes__")
    with pytest.raises(Stopped) as stopped, advised(lambda: "inner", after_error=lambda: "go on"):
        raise Stopped(signal.SIGTERM)
    assert stopped.value.reason == "stopped; inner"


@pytest.mark.parametrize("wait", list(WAITS))
def test_advice_is_shown_however_the_command_ends(wait: str, tmp_path: Path) -> None:
    advised = "with shutdown.advised(lambda: 'go on'):\n            print('advised', flush=True)\n            "
    script = COMMAND.format(wait=advised + WAITS[wait].replace("\n", "\n    "))
    call = [sys.executable, "-c", script, str(tmp_path / "private")]
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as command:
        assert command.stdout is not None and command.stderr is not None
        while command.stdout.readline() != "advised\n":
            assert command.poll() is None
        command.terminate()
        assert command.wait(timeout=30) == 143
        assert command.stderr.read() == "fedsplit: stopped; go on\n"


HANGS = """
import sys, time

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "fedsplit.commands":
            print("importing", flush=True)
            time.sleep(600)

sys.meta_path.insert(0, Finder())
"""

DOORS = ["simulate", "evaluate", "generate", "adapters", "data", "reference", "clean", "report"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("door", DOORS)
def test_a_signal_while_python_imports_is_one_line(door: str, number: int, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HANGS)
    root = Path(fedsplit.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{root}"}
    call = [sys.executable, "-m", f"fedsplit.{door}", "--help"]
    with subprocess.Popen(
        call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
    ) as command:
        assert command.stdout is not None and command.stderr is not None
        assert command.stdout.readline() == "importing\n"
        command.send_signal(number)
        assert command.wait(timeout=30) == 128 + number
        assert command.stderr.read() == "fedsplit: stopped\n"


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

    def close(self) -> None:
        """Closes the terminal, as a window or a lost connection does."""
        os.close(self._terminal)

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


LOCAL = ["-m", "fedsplit.simulate", "--engine", "local", "--clients", "2", "--rounds", "500", "--train.steps", "2"]
LOCAL += ["--batch-size", "2", "--max-length", "32", "--eval.samples", "2", "--out", "run"]


def plain(shown: str) -> str:
    """Returns what a terminal shows, without colours and movements."""
    return re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", shown).strip()


@pytest.mark.slow
def test_ctrl_c_names_the_last_checkpoint_and_the_command_that_goes_on(tmp_path: Path) -> None:
    """Which does go on."""
    terminal = Terminal(*LOCAL, cwd=tmp_path)
    terminal.read_until("round 2/500  evaluating", seconds=120)
    terminal.press(b"\x03")
    assert terminal.exit_code(seconds=10) == 130
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("round-*"))
    words = f"fedsplit: stopped; the last checkpoint is run/checkpoints/{names[-1]}: "
    last = plain(terminal.shown).splitlines()[-1]
    assert last == f"{words}python -m fedsplit.simulate --resume run goes on"
    assert not (tmp_path / "run" / "clients").exists()
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
    call = [sys.executable, *last.partition(": python ")[2].removesuffix(" goes on").split()]
    rounds = int(names[-1].removeprefix("round-")) + 1
    done = subprocess.run([*call, "--rounds", str(rounds)], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_ctrl_c_before_the_first_round_says_that_nothing_is_saved(tmp_path: Path) -> None:
    terminal = Terminal(*LOCAL, cwd=tmp_path)
    terminal.read_until("round 0/500  evaluating", seconds=120)
    terminal.press(b"\x03")
    assert terminal.exit_code(seconds=10) == 130
    advice = "nothing is saved yet: python -m fedsplit.simulate --resume run begins again"
    assert plain(terminal.shown).endswith(f"fedsplit: stopped; {advice}")


@pytest.mark.slow
def test_a_closed_terminal_ends_a_run_with_129(tmp_path: Path) -> None:
    terminal = Terminal(*LOCAL, cwd=tmp_path)
    terminal.read_until("round 1/500", seconds=120)
    terminal.close()
    assert os.waitstatus_to_exitcode(os.waitpid(terminal.pid, 0)[1]) == 129
    assert not (tmp_path / "run" / "clients").exists()
    assert not list((tmp_path / "run").rglob("*.draft"))


@pytest.mark.slow
def test_a_closed_output_ends_a_run_with_a_word(tmp_path: Path) -> None:
    call = [sys.executable, *LOCAL]
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as run:
        assert run.stdout is not None and run.stderr is not None
        for line in run.stdout:
            if line.startswith("round 1/500"):
                break
        run.stdout.close()
        said = run.stderr.read()
    assert run.returncode == 1
    assert said.startswith("fedsplit: ") and "output was closed" in said and said.count("\n") == 1
    assert not (tmp_path / "run" / "clients").exists()


RUN = ["--clients", "3", "--rounds", "50", "--train.steps", "4", "--batch-size", "2", "--max-length", "32"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "presses"),
    [("round 0/50  evaluating", 2), ("trained  loss", 1), ("trained  loss", 2), ("round 1/50  evaluating", 1)],
)
def test_ctrl_c_in_a_terminal_ends_a_run_and_leaves_nothing(words: str, presses: int, tmp_path: Path) -> None:
    terminal = Terminal("-m", "fedsplit.simulate", *RUN, "--eval.samples", "4", "--out", "run", cwd=tmp_path)
    terminal.read_until(words, seconds=240)
    started = psutil.Process(terminal.pid).children(recursive=True)
    assert started and (tmp_path / "run" / "clients" / "data").is_dir()
    for _ in range(presses):
        terminal.press(b"\x03")
    assert terminal.exit_code(seconds=30) == 130, terminal.shown
    if presses == 1:  # a second Ctrl-C throws away what the terminal has not shown yet
        assert plain(terminal.shown).splitlines()[-1].startswith("fedsplit: stopped; ")
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
        said = run.stderr.read()
        assert said.startswith("fedsplit: stopped; the last checkpoint is run/checkpoints/round-0001: ")
        assert said.count("\n") == 1
    psutil.wait_procs(started, timeout=10)
    assert [process for process in started if process.is_running()] == []
    assert not (tmp_path / "run" / "clients").exists()


def test_what_does_not_close_is_left() -> None:
    def fails() -> None:
        raise OSError("no such session")

    assert bounded(lambda: None)
    assert not bounded(threading.Event().wait, seconds=0.1)
    with pytest.raises(OSError, match="no such session"):
        bounded(fails)


LEAVES = """
import atexit, ctypes, subprocess, sys, threading
from fedsplit import shutdown

shutdown.listen()
atexit.register(print, "exit function of the user's")
shutdown.LEAVING_SECONDS = 1.0
quiet = {{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}}
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], **quiet)
print(child.pid)
libc = ctypes.CDLL(None)
{hang}
shutdown.leave(3)
"""

HANGS_AT_THE_END = {
    "a thread": "threading.Thread(target=threading.Event().wait).start()",
    "an exit function": "atexit.register(threading.Event().wait)",
    "a native library": "libc.on_exit(libc.pause, None)",
}


@pytest.mark.parametrize("hang", HANGS_AT_THE_END)
def test_what_hangs_at_the_end_keeps_neither_the_process_nor_its_exit_code(hang: str) -> None:
    call = [sys.executable, "-c", LEAVES.format(hang=HANGS_AT_THE_END[hang])]
    done = subprocess.run(call, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (3, "")
    child, *shown = done.stdout.splitlines()
    if hang == "a native library":  # an orderly end: all exit functions of Python were called, and nobody was killed
        assert shown == ["exit function of the user's"]
        psutil.Process(int(child)).kill()
    else:
        assert not psutil.pid_exists(int(child)) or psutil.Process(int(child)).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("door", DOORS)
def test_every_command_leaves_so(door: str) -> None:
    source = Path(fedsplit.__file__).with_name(f"{door}.py").read_text()
    assert source.endswith('if __name__ == "__main__":\n    leave(main())\n')


def test_the_exit_code_of_an_end_by_force_stands_whatever_fails_on_the_way() -> None:
    code = "from fedsplit import shutdown\n"
    code += "def fails(): raise OSError('no processes to be seen')\n"
    code += "shutdown.kill_descendants = fails\nshutdown.end_now(130, 'stopped')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 130
