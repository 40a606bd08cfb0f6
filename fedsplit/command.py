"""Exit codes of all commands, and errors in one line."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable

from fedsplit.allowed import InputError
from fedsplit.environment import prefer_installed
from fedsplit.shutdown import Stopped, end_now, stoppable


def exit_code(work: Callable[[], object]) -> int:
    """Does the work of a command, and reports in one line what ended it.

    A command that a signal stops ends here, with its process.

    Returns:
        0 if the work ended well, 1 if it broke, 2 if the input was wrong, 130 on Ctrl-C.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it, and it tells what else it could use
    prefer_installed()
    _write_what_the_terminal_can()
    try:
        with stoppable():
            work()
    except InputError as error:
        _report(str(error))
        return 2
    except Stopped as stopped:
        end_now(stopped.exit_code)
    except KeyboardInterrupt:
        _report("stopped")
        return 130
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "fedsplit":
            raise
        _report(str(error))
        return 1
    return 0


def _report(text: str) -> None:
    print("fedsplit:", *text.split(), file=sys.stderr)


def _write_what_the_terminal_can() -> None:
    """Replaces characters that the output's encoding lacks by question marks, in place of an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
