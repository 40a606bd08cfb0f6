"""The command `fedsplit`, or `python -m fedsplit`: a single entry to all commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

import fedsplit
from fedsplit.commands import COMMANDS, module_of
from fedsplit.errors import InputError
from fedsplit.shutdown import leave, listen


def usage() -> str:
    """Returns the help text.

    Example:
        >>> print(usage().splitlines()[0])
        usage: fedsplit [--help] [--version] COMMAND ...
    """
    lines = [f"  {name:<14}{help}" for name, help in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fedsplit [--help] [--version] COMMAND ...",
            "",
            "Federated split learning of causal language models, simulated faithfully.",
            "",
            "commands:",
            *lines,
            "",
            "fedsplit COMMAND --help shows the flags of a command. Flags without a command are those of simulate.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; see `fedsplit.commands.exit_codes.exit_code` for the exit code.

    Args:
        argv: Name and arguments of the command; None for the arguments of the process.

    Example:
        >>> main(["--version"])  # doctest: +ELLIPSIS
        fedsplit ...
        0
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0
    if words[0] == "--version":
        print("fedsplit", fedsplit.__version__)
        return 0
    if words[0].startswith("-"):  # `fedsplit --clients 4` runs a federation
        words.insert(0, "simulate")
    if words[0] not in COMMANDS:
        from fedsplit.commands.exit_codes import exit_code

        return exit_code(lambda: _refuse(words[0]), words)
    module = import_module(module_of(words[0]))
    code: int = module.main(words[1:])
    return code


def _refuse(name: str) -> None:
    """Refuses a command that does not exist.

    Raises:
        InputError: Always.
    """
    from fedsplit.settings.documents import suggest

    raise InputError(f"there is no command {name}; {suggest(name, COMMANDS)}")


def command() -> NoReturn:
    """Runs the command in the arguments of the process, and ends the process."""
    listen()
    leave(main())


if __name__ == "__main__":
    command()
