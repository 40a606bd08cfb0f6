"""The command, watched by a test as its lines are shown, and the bytes that it leaves."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path


class WatchedRun(subprocess.Popen[str]):
    """The command.

    Attributes:
        shown: Lines that it has printed so far.
    """

    def __init__(self, cwd: Path, *argv: str, env: Mapping[str, str] | None = None) -> None:
        call = [sys.executable, "-m", "fedsplit.simulate", *argv]
        super().__init__(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, env=env)
        self.shown = ""

    def wait_for(self, beginning: str) -> None:
        """Reads until a line that begins so."""
        assert self.stdout is not None
        for line in self.stdout:
            self.shown += line
            if line.startswith(beginning):
                return
        assert self.stderr is not None
        raise AssertionError(f"no line begins with {beginning}:\n{self.shown}\n{self.stderr.read()}")

    @contextlib.contextmanager
    def halted(self, beginning: str) -> Iterator[None]:
        """Reads until a line that begins so, and halts the command inside the context.

        No round ends meanwhile: on a slow machine the run would be over before a test has found its processes. They go
        on with what they were asked for.
        """
        self.wait_for(beginning)
        self.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.send_signal(signal.SIGCONT)

    def end(self, seconds: float | None = None) -> tuple[int, str]:
        """Waits for the end; returns the exit code and what was written to stderr."""
        shown, errors = self.communicate(timeout=seconds)
        self.shown += shown
        return self.returncode, errors


def adapters(run: Path) -> dict[str, bytes]:
    """Returns the adapter and the tensors of the second round's checkpoint of a run."""
    files = [run / "adapter" / "adapter_model.safetensors", *run.glob("checkpoints/round-0002/**/*.safetensors")]
    return {str(file.relative_to(run)): file.read_bytes() for file in files}
