"""What all commands have in common: exit codes, and errors in one line."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

from fedsplit.allowed import InputError


def exit_code(work: Callable[[], object]) -> int:
    """Does a command's work; what ends it is said in one line.

    Returns:
        0 where it ended well, 1 where it broke, 2 where it was asked for wrongly, 130 on Ctrl-C.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it, and it tells what else it could use
    try:
        work()
    except InputError as error:
        print("fedsplit:", *str(error).split(), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fedsplit: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "fedsplit":
            raise
        print("fedsplit:", *str(error).split(), file=sys.stderr)
        return 1
    return 0
