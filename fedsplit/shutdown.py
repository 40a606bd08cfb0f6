"""Orderly shutdown: turns a signal into an exception, and leaves no process and no temporary file behind."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that stop a command: Ctrl-C, a request to terminate, and a closed terminal."""

GRACE_SECONDS = 6.0
"""Time for an orderly end after a signal, before the process is ended by force."""

CLOSING_SECONDS = 30.0
"""Time to wait until something is closed, such as Ray, whose work is done."""

LEAVING_SECONDS = 30.0
"""Time that threads and exit functions have at the end of a command, before the process is ended by force."""

_KILL_SECONDS = 2.0
"""Time to wait for killed processes to disappear."""

_SPEAK_SECONDS = 1.0
"""Time for the last line, since nobody may read the output."""

_cleanups: list[Callable[[], object]] = []
_advice: list[Callable[[], str]] = []


class Stopped(KeyboardInterrupt):
    """A signal asked the command to stop.

    Derived from KeyboardInterrupt, since libraries catch `Exception` and would go on.

    Attributes:
        signal: Number of the signal.
        advice: What the user can do next; empty where nothing is to be said.

    Example:
        >>> Stopped(signal.SIGTERM).exit_code
        143
    """

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal
        self.advice = ""

    @property
    def reason(self) -> str:
        """The line to show.

        Example:
            >>> Stopped(signal.SIGTERM).reason
            'stopped'
        """
        return "; ".join(filter(None, ("stopped", self.advice)))

    @property
    def exit_code(self) -> int:
        """Exit code by the shell's convention: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.signal


_heard: Stopped | None = None
"""What the first signal raised."""

_exit_code: int | None = None
"""Exit code of a command that is leaving."""


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
def advised(advice: Callable[[], str], after_error: Callable[[], str] | None = None) -> Iterator[None]:
    """Adds advice to the line that is shown if a signal or an error ends the command inside the context.

    Args:
        advice: Returns what the user can do next. It is called once the signal has come. The innermost context counts.
        after_error: Returns the same after an error, whose note it becomes; empty where nothing is to be said.

    Example:
        >>> with contextlib.suppress(Stopped), advised(lambda: "nothing is saved yet"):
        ...     raise Stopped(signal.SIGTERM)
    """
    _advice.append(advice)
    try:
        yield
    except BaseException as error:
        stopped = error if isinstance(error, Stopped) else _heard
        if stopped is not None:
            stopped.advice = stopped.advice or advice()
        elif after_error is not None and (words := after_error()):
            error.add_note(words)
        raise
    finally:
        _advice.remove(advice)


def listen() -> None:
    """Makes a signal end the process at once, in one line, until `stoppable` installs its handlers.

    The modules that start a command call this function before their imports, which take a second in which Python would
    show a traceback. A signal that is ignored, as under nohup, stays ignored.

    The function also prepares `leave`.
    """
    atexit.register(_leave_now)  # the first exit function to be registered is the last one to be called

    def stop(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(OSError):
            os.write(2, b"fedsplit: stopped\n")  # not by print, which a signal may have interrupted
        os._exit(Stopped(number).exit_code)

    for number in SIGNALS:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            signal.signal(number, stop)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Turns the first signal into `Stopped`, raised in the main thread. A second signal ends the process at once.

    A library may swallow the exception, or never return. So a thread ends the process by force after `GRACE_SECONDS`.
    Outside the main thread no handler is installed, since Python delivers signals to the main thread only. A signal
    that was ignored when the command started, as under nohup, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    import psutil  # noqa: F401  # for `end_now`, since a signal may interrupt an import

    global _heard
    _heard = None

    def stop(number: int, frame: FrameType | None) -> None:
        global _heard
        if _heard is not None:
            end_now(_heard.exit_code, _stopped())
        _heard = Stopped(number)
        threading.Thread(target=_end_later, args=(_heard.exit_code,), daemon=True).start()
        raise _heard

    before = {number: signal.getsignal(number) for number in SIGNALS}
    handled = [number for number in SIGNALS if before[number] not in (signal.SIG_IGN, None)]
    for number in handled:
        signal.signal(number, stop)
    try:
        yield
    except BaseException as error:
        if _heard is not None and error is not _heard:
            raise _heard from error  # a clean-up failed on the way, as where the terminal is gone
        raise
    finally:
        if _heard is None:  # after a signal the handlers stay: a second one kills at once during the end, too
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


def bounded(close: Callable[[], object], seconds: float | None = None) -> bool:
    """Calls a function that closes something, and waits for the return only for a time.

    A library may hang as it is closed, with all work done. The call is made in a thread, which then is left behind.

    Args:
        close: The function.
        seconds: Longest wait; None for `CLOSING_SECONDS`.

    Returns:
        True if the function has returned.

    Raises:
        Exception: Whatever the function raised.

    Example:
        >>> bounded(lambda: None)
        True
        >>> bounded(threading.Event().wait, seconds=0.1)
        False
    """
    raised: list[BaseException] = []

    def call() -> None:
        try:
            close()
        except BaseException as error:  # noqa: BLE001  # the caller's thread raises it
            raised.append(error)

    longest = CLOSING_SECONDS if seconds is None else seconds
    thread = threading.Thread(target=call, name="closing", daemon=True)
    thread.start()
    thread.join(longest)
    if raised:
        raise raised[0]
    if thread.is_alive():
        logging.getLogger("fedsplit").debug("%s has not returned for %g seconds, and is left", close, longest)
    return not thread.is_alive()


def leave(exit_code: int) -> NoReturn:
    """Ends the process of a command whose work is done, though something may hang.

    Threads and exit functions, such as those of the user's code, have `LEAVING_SECONDS` to end. What Python and native
    libraries would tear down after them is left to the system. The exit code is that of the work in any case.

    Args:
        exit_code: Exit code of the process.
    """
    global _exit_code
    _exit_code = exit_code
    threading.Thread(target=_leave_later, args=(exit_code,), daemon=True).start()
    sys.exit(exit_code)


def _leave_now() -> None:
    """Ends the process of a command that is leaving, as its last exit function."""
    if _exit_code is not None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # the reader of the output may be gone
                stream.flush()
        os._exit(_exit_code)


def _leave_later(exit_code: int) -> None:
    """Waits until the process has ended, and ends the process if that takes too long."""
    threading.Event().wait(LEAVING_SECONDS)
    end_now(exit_code)


def end_now(exit_code: int, reason: str = "") -> NoReturn:
    """Reports why the command ends, and ends the process at once.

    Descendants are killed, clean-ups are run, and threads of libraries are not waited for.

    Args:
        exit_code: Exit code of the process.
        reason: One line for the reader; empty for no line.
    """
    try:
        kill_descendants()  # first, since descendants may write into folders that the clean-ups remove
        while _cleanups:
            with contextlib.suppress(Exception):  # the process ends anyway
                _cleanups.pop()()
        speaker = threading.Thread(target=_say, args=(reason,), daemon=True)
        speaker.start()
        speaker.join(_SPEAK_SECONDS)
    finally:  # whatever goes wrong on the way, the caller is told why the command ended
        os._exit(exit_code)


def _say(reason: str) -> None:
    """Shows the last line of the command."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # the reader of the output may be gone
        if reason:
            print(f"fedsplit: {reason}", file=sys.stderr, flush=True)
        sys.stdout.flush()


def _stopped() -> str:
    """Returns the reason of an end by force: a signal, and what the user can do next."""
    advice = ""
    with contextlib.suppress(Exception):  # the process ends anyway
        advice = _advice[-1]() if _advice else ""
    return "; ".join(filter(None, ("stopped", advice)))


def _end_later(exit_code: int) -> None:
    """Waits for the orderly end, and ends the process if the end does not come in time."""
    threading.Event().wait(GRACE_SECONDS)
    end_now(exit_code, _stopped())
