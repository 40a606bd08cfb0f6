"""Exit codes and one-line error messages of all commands."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable

from fedsplit.environment import prefer_installed
from fedsplit.errors import InputError
from fedsplit.shutdown import Stopped, end_now, stoppable
from fedsplit.watchdog import Hung

ENDED_EARLY = 3
"""Exit code of a run that has left a result, though not all of its rounds could be played."""


def exit_code(work: Callable[[], object]) -> int:
    """Does the work of a command. An error is reported in one line on stderr.

    If a signal stops the command, the process ends here.

    Args:
        work: The work. A number that it returns is the exit code.

    Returns:
        0 for success, 1 for a failure, 2 for wrong input, `ENDED_EARLY` for a run that has left a result before its
        last round, 130 for Ctrl-C.

    Example:
        >>> exit_code(lambda: None)
        0
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it, and it advertises other backends
    prefer_installed()
    _write_what_the_terminal_can()
    try:
        with stoppable():
            result = work()
    except InputError as error:
        _report(str(error))
        return 2
    except Stopped as stopped:
        end_now(stopped.exit_code)
    except Hung as hung:
        end_now(1, str(hung))  # its thread cannot be ended, and would be waited for
    except KeyboardInterrupt:
        _report("stopped")
        return 130
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "fedsplit":
            raise
        _report(str(error))
        return 1
    return result if isinstance(result, int) else 0


def _report(text: str) -> None:
    print("fedsplit:", *text.split(), file=sys.stderr)


def _write_what_the_terminal_can() -> None:
    """Makes output print a question mark for a character that its encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
