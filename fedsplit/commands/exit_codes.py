"""Exit codes and one-line error messages of all commands."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence

from fedsplit.environment import prefer_installed, private_files
from fedsplit.errors import InputError
from fedsplit.settings.flags import DEBUG
from fedsplit.shutdown import Stopped, end_now, stoppable
from fedsplit.watchdog import Hung

ENDED_EARLY = 3
"""Exit code of a run that has left a result, though not all of its rounds could be played."""


def exit_code(work: Callable[[], object], argv: Sequence[str] | None = None) -> int:
    """Does the work of a command. Each error is reported in one line on stderr.

    If a signal stops the command, the process ends here. With `--debug` among the arguments, the tracebacks of errors
    are shown, too. Without the flag no traceback is shown, whatever the error.

    Args:
        work: The work. A number that it returns is the exit code.
        argv: Arguments of the command; None for those of the process.

    Returns:
        0 for success, 1 for a failure, 2 for wrong input, `ENDED_EARLY` for a run that has left a result before its
        last round, 130 for Ctrl-C.

    Example:
        >>> exit_code(lambda: None)
        0
    """
    shows_tracebacks = DEBUG in (sys.argv[1:] if argv is None else argv)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it, and it advertises other backends
    prefer_installed()
    _write_what_the_terminal_can()
    with _with_debug_log() if shows_tracebacks else _without_tracebacks():
        try:
            with stoppable(), private_files():
                result = work()
                sys.stdout.flush()  # here, where a closed output is still an error that can be reported
        except Stopped as stopped:
            end_now(stopped.exit_code, stopped.reason)
        except Hung as hung:
            end_now(1, _with_notes(hung, str(hung)))  # its thread cannot be ended, and would be waited for
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  # nobody above reports it
            if shows_tracebacks:
                traceback.print_exc()
            return _reported(error)
    return result if isinstance(result, int) else 0


def _reported(error: BaseException) -> int:
    """Reports an error, and returns the exit code."""
    match error:
        case InputError():
            for each in error.errors:
                _report(str(each))
            return 2
        case KeyboardInterrupt():
            _report("stopped")
            return 130
        case BrokenPipeError():
            # Python would try to write what is left when it exits, and print a traceback.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            _report("the output was closed")
            return 1
    if type(error).__module__.partition(".")[0] == "fedsplit":
        _report(_with_notes(error, str(error)))
    else:
        _report(_with_notes(error, f"{_words(error)}; {DEBUG} shows more"))
    return 1


def _with_notes(error: BaseException, words: str) -> str:
    """Returns words about an error, with its notes, such as the command by which a run goes on."""
    return "; ".join([words, *getattr(error, "__notes__", [])])


@contextlib.contextmanager
def _with_debug_log() -> Iterator[None]:
    """Shows the log of fedsplit on stderr, such as the tracebacks of clients that failed in this process."""
    log = logging.getLogger("fedsplit")
    level = log.level
    handler = logging.StreamHandler()
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


@contextlib.contextmanager
def _without_tracebacks() -> Iterator[None]:
    """Makes Python report errors that nobody catches, as in threads, in one line each, without a traceback."""
    thread_hook = threading.excepthook
    unraisable_hook = sys.unraisablehook
    logs_errors = logging.raiseExceptions
    threading.excepthook = _report_of_thread
    sys.unraisablehook = lambda _: None  # raised where Python frees objects, with no effect on the result
    logging.raiseExceptions = False
    try:
        yield
    finally:
        threading.excepthook = thread_hook
        sys.unraisablehook = unraisable_hook
        logging.raiseExceptions = logs_errors


def _report_of_thread(arguments: threading.ExceptHookArgs) -> None:
    """Reports the error that ended a thread; the signature is that of `threading.excepthook`."""
    name = arguments.thread.name if arguments.thread else "a thread"
    if arguments.exc_value is not None and not isinstance(arguments.exc_value, SystemExit):
        _report(f"{name} ended: {_words(arguments.exc_value)}; {DEBUG} shows more")


def _words(error: BaseException) -> str:
    """Returns the type and the message of an error."""
    return ": ".join(filter(None, (type(error).__name__, str(error))))


def _report(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
        print("fedsplit:", *text.split(), file=sys.stderr)


def _write_what_the_terminal_can() -> None:
    """Makes output print a question mark for a character that its encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
