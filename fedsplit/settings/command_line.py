"""A command line, parsed so that all its errors are found, and so that the flags without an error can be checked."""

from __future__ import annotations

import argparse
import itertools
import sys
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from fedsplit.errors import InputError, check_all, shortened
from fedsplit.settings.config import OPTIONS
from fedsplit.settings.documents import BY_ALIAS, similar, suggest
from fedsplit.settings.drafts import unreadable

DEBUG = "--debug"
"""Flag of every command: an error is shown with its traceback."""

Options = dict[str, dict[str, Any]]
"""Keyword arguments for a class, by the setting that names the class."""


class Parser(argparse.ArgumentParser):
    """Argument parser that raises an error of one line, where argparse prints its usage and exits.

    Every parser has the flag `--debug`, which `fedsplit.commands.exit_codes.exit_code` looks for.
    """

    def __init__(self, **keywords: Any) -> None:
        """Makes a parser; see `argparse.ArgumentParser` for the keyword arguments."""
        super().__init__(exit_on_error=False, **keywords)  # `read` collects the errors
        # Without a default, as a parser of a subcommand would overwrite what the parser above it has read.
        self.add_argument(DEBUG, action="store_true", default=argparse.SUPPRESS, help="show tracebacks of errors")

    def read(
        self,
        argv: Sequence[str] | None = None,
        options: Collection[str] = (),
    ) -> Call:
        """Parses a command line. Wrong flags are part of the result, so that the other flags can still be checked.

        Args:
            argv: Arguments; None for those of the process.
            options: Settings whose options the command takes, by flags such as `--strategy.KEY VALUE`.

        Example:
            >>> parser = Parser()
            >>> _ = parser.add_argument("--client", type=int)
            >>> call = parser.read(["--client", "x", "--cleint", "3"])
            >>> for error in call.errors:
            ...     print(error)
            argument --client: invalid int value: 'x'; see --help
            there is no flag --cleint; did you mean --client?
        """
        flags = {flag: action.dest for action in self._every_action() for flag in action.option_strings}
        del flags["--help"]  # no suggestion in place of an unknown flag
        return _with_options(self.read_known(argv), options, flags)

    def read_known(self, argv: Sequence[str] | None = None) -> Call:
        """Parses a command line as `read` does, and leaves the words that are no flags of this parser in `rest`."""
        words, errors, refused = self._without_empty_flags(sys.argv[1:] if argv is None else argv)
        lifted: set[str] | None = None
        while True:
            try:
                flags, rest = self.parse_known_args(words)
                break
            except (argparse.ArgumentError, InputError) as error:
                # argparse reports the first wrong argument only. The others are found by trying again without it.
                errors.append(error if isinstance(error, InputError) else InputError(f"{error}; see --help"))
                wrong = self._actions_named(getattr(error, "argument_name", None))
                if wrong:
                    words = _without_flags(words, {flag for action in wrong for flag in action.option_strings})
                    refused |= _made_optional(wrong)
                # No flag is wrong by itself: a required one is missing. The rest of the line is read as if none were
                # required.
                elif lifted is None:
                    lifted = _made_optional(action for action in self._every_action() if action.required)
                else:
                    # The rest cannot be read at all, such as flags without the name of a subcommand.
                    check_all(errors)
        vars(flags).pop("debug", None)  # `exit_code` looks for it in the command line itself
        # A required flag that is missing has no value that a check may read.
        refused |= {dest for dest in lifted or () if vars(flags).get(dest) is None}
        return Call(unreadable(flags, refused), {}, rest, errors, refused)

    def _without_empty_flags(
        self,
        words: Sequence[str],
    ) -> tuple[list[str], list[InputError], set[str]]:
        """Takes out the flags that lack their value.

        Args:
            words: The command line.

        Returns:
            The other words, an error for each flag that was taken out, and the destinations of these flags.

        Example:
            >>> parser = Parser()
            >>> _ = parser.add_argument("--out"), parser.add_argument("--rank")
            >>> words, errors, _ = parser._without_empty_flags(["--out", "--rank", "3"])
            >>> words, [str(error) for error in errors]
            (['--rank', '3'], ['--out: expected a value after it'])
        """
        of_one_value = {
            flag: action for action in self._every_action() if action.nargs is None for flag in action.option_strings
        }
        kept: list[str] = []
        errors: list[InputError] = []
        empty: list[argparse.Action] = []
        for word, after in itertools.zip_longest(words, words[1:]):
            if word in of_one_value and (after is None or _is_flag(after)):
                errors.append(InputError(f"{word}: expected a value after it"))
                empty.append(of_one_value[word])
            else:
                kept.append(word)
        return kept, errors, _made_optional(empty)

    def _every_action(self) -> Iterator[argparse.Action]:
        """Yields the arguments of this parser and of its subparsers."""
        for action in self._actions:
            yield action
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    yield from parser._every_action()

    def _actions_named(self, name: str | None) -> list[argparse.Action]:
        """Returns the flags that argparse gives a name in its errors; several, if several subcommands have the flag."""
        return [action for action in self._every_action() if name and "/".join(action.option_strings) == name]

    def error(self, message: str) -> NoReturn:
        """Raises an `InputError`."""
        raise InputError(f"{message}; see --help")


@dataclass(frozen=True)
class Call:
    """A command line, parsed, in which flags may be wrong.

    Attributes:
        flags: Values of the flags. Reading the value of a wrong flag raises `UnknownValue`.
        options: Options such as `--strategy.KEY VALUE`, by setting.
        rest: Words that are neither flags of the parser nor their values.
        errors: The errors, in the order in which a user reads them.
        refused: Destinations of the wrong flags, and names of the tables in which an option lacks its value.
    """

    flags: argparse.Namespace
    options: Options
    rest: list[str]
    errors: list[InputError]
    refused: set[str]

    def checked(self) -> argparse.Namespace:
        """Returns the flags.

        Raises:
            InputError: A flag is wrong. All errors are reported together.
        """
        check_all(self.errors)
        return self.flags


def _made_optional(actions: Iterable[argparse.Action]) -> set[str]:
    """Makes arguments optional, so that a command line can be parsed without them, and returns their destinations.

    The name of a subcommand stays required: without it, nobody can tell which flags there are.
    """
    changed = set()
    for action in actions:
        if not isinstance(action, argparse._SubParsersAction):
            action.required = False
            changed.add(action.dest)
    return changed


def _without_flags(words: Sequence[str], flags: Collection[str]) -> list[str]:
    """Returns a command line without some flags and their values."""
    kept: list[str] = []
    is_value = False
    for word in words:
        name, equals, _ = word.partition("=")
        if name in flags:
            is_value = not equals
        elif is_value and not word.startswith("--"):
            is_value = False
        else:
            kept.append(word)
    return kept


def _is_flag(word: str) -> bool:
    """Returns True for a word of the command line that argparse takes for a flag: no text, and no negative number.

    Example:
        >>> [_is_flag(word) for word in ("--rounds", "--nope=3", "-1", "-", "-- a text")]
        [True, True, False, False, False]
    """
    return word.startswith("--") and word != "--" and " " not in word.partition("=")[0]


def _with_options(call: Call, settings: Collection[str], known: Mapping[str, str]) -> Call:
    """Reads flags such as `--strategy.KEY VALUE` from the `rest` of a command line.

    Args:
        call: The command line.
        settings: Settings whose options the command takes.
        known: Destinations by flag. The error of an unknown flag suggests a similar one.

    Returns:
        The command line without a rest. A setting that the user may have meant by an unknown flag has no value.
    """
    words = []
    for argument in call.rest:
        # A flag and its value may be one word, as in --strategy.mu=0.1.
        words += argument.split("=", 1) if argument.startswith("--") else [argument]

    options: Options = {setting: {} for setting in settings}
    errors = [*call.errors]
    refused = {*call.refused}
    while words:
        flag = words.pop(0)
        given, _, key = flag.removeprefix("--").partition(".")
        setting = BY_ALIAS.get(given, given)
        has_value = bool(words) and not words[0].startswith("--")
        if not flag.startswith("--") or not key or setting not in settings:
            errors.append(InputError(f"there is no flag {shortened(flag)}; {suggest(flag, known)}"))
            meant = {known[close] for close in similar(flag, known)}
            # A setting that was given beside the unknown flag keeps its value.
            refused |= {dest for dest in meant if not vars(call.flags).get(dest)}
            if flag.startswith("--") and has_value:  # the value of a flag that is unknown is no error of its own
                words.pop(0)
        elif not words:
            errors.append(InputError(f"{flag}: expected a value after it"))
            refused.add(OPTIONS[setting])
        else:
            options[setting][key] = _toml_value(words.pop(0))
    return Call(unreadable(call.flags, refused), options, [], errors, refused)


def _toml_value(text: str) -> object:
    """Returns the value that a text stands for in TOML, such as 0.5 or true; the text itself if it is no TOML."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text
