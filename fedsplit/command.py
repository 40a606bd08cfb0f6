"""What all commands have in common: exit codes, errors in one line, and libraries that are quiet."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable

from fedsplit.config import InputError

QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}
"""The environment in which libraries show nothing of their own."""


def quieten(offline: bool = True) -> None:
    """Sets what must be set before the libraries are imported, since they read it only then.

    Args:
        offline: Whether nothing may be asked of the Hub.
    """
    for name, value in {**QUIET, **({"HF_HUB_OFFLINE": "1"} if offline else {})}.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")


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
