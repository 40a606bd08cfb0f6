"""`fedsplit completion bash|zsh`: prints a script by which a shell completes commands, flags and values of flags.

The flags come from the parsers of the commands, and the values from the settings, so that there is no second list.
shtab makes a script of flags and values, which the shell runs without starting Python.
"""

from __future__ import annotations

import argparse
import re
import runpy
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import fedsplit
from fedsplit.adaptation.methods import ADAPTER_METHODS
from fedsplit.commands import COMMANDS, module_of
from fedsplit.commands.exit_codes import exit_code
from fedsplit.corpora.tables import MADE
from fedsplit.settings.choices import PROMPTED
from fedsplit.settings.command_line import Parser
from fedsplit.settings.config import DEFAULT_MODEL, SETTINGS
from fedsplit.settings.flags import make_parser as simulate_parser

SHELLS = ("bash", "zsh")

_FILES = ("config", "lora.options", "prompts", "plot", "token_file", "trunk.token_file")
"""Arguments whose value is a file."""

_FOLDERS = ("out", "resume", "run", "runs", "first", "second", "init_adapter", "tls", "trunk.tls", "folder")
"""Arguments whose value is a folder."""


def values_of(name: str) -> list[str]:
    """Returns the values of a setting that chooses among words. Settings such as numbers have an empty list.

    Args:
        name: Dotted name of the setting.

    Example:
        >>> values_of("dtype")
        ['fp32', 'bf16', 'fp16']
        >>> values_of("rounds")
        []
    """
    if name == "strategy":
        return _strategies()
    if name == "lora.method":
        return [*ADAPTER_METHODS, *PROMPTED]
    alternatives = SETTINGS[name].allowed.words.split(" | ")
    if len(alternatives) == 1:
        return []
    words = [alternative.partition("[")[0] for alternative in alternatives]  # cuda for cuda[:N]
    # Without patterns such as cuda:N: a shell would complete the letter N.
    return [word for word in words if re.fullmatch(r"[a-z0-9_-]+", word)]


def _strategies() -> list[str]:
    """Returns the names of the strategies beside this package."""
    # The file runs by its path: fedsplit imports nothing from `strategies`, and a user's package may have that name.
    file = Path(fedsplit.__file__).parent.parent / "strategies" / "__init__.py"
    return sorted(runpy.run_path(str(file))["STRATEGIES"])


def all_parsers() -> Parser:
    """Returns a parser with every command. Each argument is annotated with its completion."""
    parser = Parser(prog="fedsplit", description="Federated split learning of causal language models.")
    parser.add_argument("--version", action="version", version=fedsplit.__version__, help="show the version")
    commands = parser.add_subparsers(parser_class=Parser)
    for name, help in COMMANDS.items():
        parents = [_parser_of(name)]
        if name in ("data", "estimate"):  # they take the flags of simulate, too
            parents.append(simulate_parser())
        # "resolve", since every parent brings --help and --debug.
        added = commands.add_parser(name, help=help, description=help, parents=parents, conflict_handler="resolve")
        _annotate(added)
    return parser


def _parser_of(name: str) -> Parser:
    """Returns the parser of a command."""
    if name == "simulate":
        return simulate_parser()
    parser: Parser = import_module(module_of(name)).make_parser()
    return parser


def _annotate(parser: argparse.ArgumentParser) -> None:
    """Annotates the arguments of a parser and of its subparsers with the completion of their values."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                _annotate(subparser)
            continue
        completion = _completion_of(action.dest)
        if completion:
            action.complete = completion  # type: ignore[attr-defined]  # the attribute that shtab reads
        elif action.dest in SETTINGS:
            action.choices = values_of(action.dest) or None  # None: any value


def _completion_of(argument: str) -> Mapping[str, Any] | None:
    """Returns the completion of an argument whose value is a path, in the form of shtab; None for further arguments."""
    import shtab

    if argument == "model":
        return _names_or_files("models", [DEFAULT_MODEL])
    if argument in ("dataset", "data.held_out"):
        return _names_or_files("datasets", MADE)
    if argument in _FILES:
        return shtab.FILE
    return shtab.DIRECTORY if argument in _FOLDERS else None


def _names_or_files(what: str, names: Sequence[str]) -> dict[str, Any]:
    """Returns the completion of an argument whose value is a name or a path.

    Args:
        what: Last part of the name of the shell's function.
        names: The names.
    """
    words = " ".join(names)
    function = f"_fedsplit_{what}"
    # bash calls a function by name; zsh takes the action itself, with each colon escaped.
    bash = f'{function}() {{\n  compgen -W "{words}" -- "$1"\n  compgen -f -- "$1"\n}}'
    zsh = rf"{{_alternative 'names\:name\:({words})' 'files\:file\:_files'}}"
    return {"bash": function, "zsh": zsh, "preamble": {"bash": bash}}


def script(shell: str) -> str:
    """Returns the script that completes the command `fedsplit` in a shell.

    Args:
        shell: One of `SHELLS`.

    Example:
        >>> "--lora.rank" in script("bash")
        True
    """
    import shtab

    return str(shtab.complete(all_parsers(), shell))


def make_parser() -> Parser:
    """Returns the parser of the flags of the command."""
    parser = Parser(
        prog="fedsplit completion",
        description="Prints a script that completes commands, flags and their values.",
        epilog='bash: eval "$(fedsplit completion bash)" in ~/.bashrc. '
        "zsh: fedsplit completion zsh > _fedsplit in a folder of $fpath.",
        allow_abbrev=False,
    )
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=" | ".join(SHELLS))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see `fedsplit.commands.exit_codes.exit_code` for the exit code."""

    def work() -> None:
        flags = make_parser().read(argv).checked()
        print(script(flags.shell))

    return exit_code(work, argv)
