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
from fedsplit.settings.command_line import DEBUG
from fedsplit.shutdown import Stopped, end_now, stoppable
from fedsplit.watchdog import Hung

ENDED_EARLY = 3
"""Exit code of a run with a result, but without its last rounds."""


def exit_code(work: Callable[[], object], argv: Sequence[str] | None = None) -> int:
    """Does the work of a command. Each error is reported in one line on stderr.

    If a signal stops the command, the process ends here. With `--debug` among the arguments, the tracebacks of errors
    are shown, too. Without the flag no traceback is shown, whatever the error.

    Args:
        work: The work. A returned number is the exit code.
        argv: Arguments of the command; None for the arguments of the process.

    Returns:
        0 for success, 1 for a failure, 2 for wrong input, `ENDED_EARLY` for a run that left a result before the last
        round, 130 for Ctrl-C.

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
                # Python would flush at its exit, where nobody could report that the output is closed.
                sys.stdout.flush()
        except Stopped as stopped:
            end_now(stopped.exit_code, stopped.reason)
        except Hung as hung:
            # No exit by return: Python would wait for the thread that hangs.
            end_now(1, _with_notes(hung, str(hung)))
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  # the outermost place that can report
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
            # At its exit Python writes the rest of the output. To the closed output, that would print a traceback.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            _report("the output was closed")
            return 1
    words = words_of(error)
    _report(_with_notes(error, words if is_ours(error) else f"{words}; {DEBUG} shows more"))
    return 1


def is_ours(error: BaseException) -> bool:
    """Returns True for an error of fedsplit's, whose message is written for users."""
    return type(error).__module__.partition(".")[0] == "fedsplit"


def words_of(error: BaseException) -> str:
    """Returns an error in words. Of an error that is not fedsplit's, users and maintainers need the type, too.

    Example:
        >>> words_of(InputError("clients: 0 is not possible")), words_of(ValueError("no such key"))
        ('clients: 0 is not possible', 'ValueError: no such key')
    """
    return str(error) if is_ours(error) else _words(error)


def _with_notes(error: BaseException, words: str) -> str:
    """Returns words about an error, followed by the error's notes, such as the command that resumes the run."""
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
    """Makes Python report each uncaught error, such as an error in a thread, in one line without a traceback."""
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
    """Reports the error that ended a thread, in the place of `threading.excepthook`."""
    name = arguments.thread.name if arguments.thread else "a thread"
    error = arguments.exc_value
    # Python ignores SystemExit in a thread, too.
    if error is not None and not isinstance(error, SystemExit):
        _report(f"{name} ended: {_words(error)}; {DEBUG} shows more")


def _words(error: BaseException) -> str:
    """Returns the type and the message of an error."""
    name = type(error).__name__
    message = str(error)
    return f"{name}: {message}" if message else name


def _report(text: str) -> None:
    """Prints a text as one line on stderr."""
    with contextlib.suppress(OSError, ValueError):  # the terminal may be closed
        print("fedsplit:", *text.split(), file=sys.stderr)  # one line, whatever the text


def _write_what_the_terminal_can() -> None:
    """Makes the output print a question mark for a character without a code in the encoding, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
