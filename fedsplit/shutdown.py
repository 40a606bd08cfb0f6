"""Orderly shutdown: turns a signal into an exception, and leaves no process and no temporary file behind."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that stop a command: Ctrl-C, a request to terminate, and a closed terminal."""

GRACE_SECONDS = 8.0
"""Time for an orderly end after a signal, before the process is ended by force."""

_KILL_SECONDS = 2.0
"""Time to wait for killed processes to disappear."""

_cleanups: list[Callable[[], object]] = []


class Stopped(KeyboardInterrupt):
    """A signal asked the command to stop.

    Derived from KeyboardInterrupt, since libraries catch `Exception` and would go on.

    Attributes:
        signal: Number of the signal.

    Example:
        >>> Stopped(signal.SIGTERM).exit_code
        143
    """

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal

    @property
    def exit_code(self) -> int:
        """Exit code by the shell's convention: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.signal


@contextlib.contextmanager
def cleaned_up(cleanup: Callable[[], object]) -> Iterator[None]:
    """Calls `cleanup` when the context ends, even if the command is ended by force.

    Args:
        cleanup: Removes temporary files or the like. It may be called twice.

    Example:
        >>> with cleaned_up(lambda: print("removed")):
        ...     print("in use")
        in use
        removed
    """
    _cleanups.append(cleanup)
    try:
        yield
    finally:
        try:
            cleanup()
        finally:
            _cleanups.remove(cleanup)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Turns the first signal into `Stopped`, raised in the main thread; later signals are ignored.

    A library may swallow the exception, or never return. So a thread ends the process by force after `GRACE_SECONDS`.
    Outside the main thread no handler is installed, since Python delivers signals to the main thread only. A signal
    that was ignored when the command started, as under nohup, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        if stopped:
            return
        stopped = True
        threading.Thread(target=_end_later, args=(Stopped(number).exit_code,), daemon=True).start()
        raise Stopped(number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    handled = [number for number in SIGNALS if before[number] not in (signal.SIG_IGN, None)]
    for number in handled:
        signal.signal(number, stop)
    try:
        yield
    finally:
        if not stopped:  # after a signal the handlers stay, so that a second Ctrl-C does not interrupt the end
            for number in handled:
                signal.signal(number, before[number])


def kill_descendants(name: str = "") -> None:
    """Kills the descendants of the process, and waits until all are gone.

    Args:
        name: Beginning of the command lines of the processes to kill; empty for all.
    """
    import psutil  # not at the top: `prefer_installed` must have changed the search path before

    killed = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith(name):
                process.kill()
                killed.append(process)
    psutil.wait_procs(killed, timeout=_KILL_SECONDS)


def end_now(exit_code: int, reason: str = "stopped") -> None:
    """Reports why the command ends, and ends the process at once.

    Descendants are killed, clean-ups are run, and threads of libraries are not waited for.

    Args:
        exit_code: Exit code of the process.
        reason: One line for the reader.
    """
    kill_descendants()  # first, since descendants may write into folders that the clean-ups remove
    while _cleanups:
        with contextlib.suppress(Exception):  # the process ends anyway
            _cleanups.pop()()
    with contextlib.suppress(OSError, ValueError):  # the reader of the output may be gone
        sys.stdout.flush()
        print(f"fedsplit: {reason}", file=sys.stderr, flush=True)
    os._exit(exit_code)


def _end_later(exit_code: int) -> None:
    """Waits for the orderly end, and ends the process if the end does not come in time."""
    threading.Event().wait(GRACE_SECONDS)
    end_now(exit_code)
