"""Ends a command in good order: a signal becomes an exception, and nothing that it started stays behind."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that stop a command: Ctrl-C, a request to end, and a terminal that was closed."""

GRACE_SECONDS = 8.0
"""Time to end in good order after a signal; then the command ends by force."""

_KILL_SECONDS = 2.0

_cleanups: list[Callable[[], object]] = []


class Stopped(KeyboardInterrupt):
    """The command was asked to stop.

    Attributes:
        signal: Number of the signal.
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
    """Calls `cleanup` when the context ends, even where the command has to end by force.

    Args:
        cleanup: Removes what must not stay behind. May be called twice.

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

    A library may lose the exception, or never return. So a thread ends the command by force after `GRACE_SECONDS`.
    Outside the main thread nothing is installed, since Python delivers signals to the main thread alone. A signal that
    was ignored when the command started, as under nohup, stays ignored.
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
    heard = [number for number in SIGNALS if before[number] not in (signal.SIG_IGN, None)]
    for number in heard:
        signal.signal(number, stop)
    try:
        yield
    finally:
        if not stopped:  # else a second Ctrl-C would interrupt what ends the command
            for number in heard:
                signal.signal(number, before[number])


def kill_descendants(name: str = "") -> None:
    """Kills processes that this one started, directly or not, and waits until they are gone.

    Args:
        name: Beginning of the command lines of those to kill; all are killed where empty.
    """
    import psutil  # not before the working folder has lost its place on the path

    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith(name):
                process.kill()
                found.append(process)
    psutil.wait_procs(found, timeout=_KILL_SECONDS)


def end_now(exit_code: int) -> None:
    """Says that the command was stopped, and ends the process at once.

    Descendants are killed; threads that a library has left are not waited for.
    """
    kill_descendants()  # first, or they would write into what is removed next
    while _cleanups:
        with contextlib.suppress(Exception):  # there is nobody left to tell
            _cleanups.pop()()
    with contextlib.suppress(OSError, ValueError):  # whoever read the output may be gone
        sys.stdout.flush()
        print("fedsplit: stopped", file=sys.stderr, flush=True)
    os._exit(exit_code)


def _end_later(exit_code: int) -> None:
    threading.Event().wait(GRACE_SECONDS)
    end_now(exit_code)
