"""Flags: parses the command line, and the settings file that it names, into a configuration."""

from __future__ import annotations

import argparse
import itertools
import sys
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

from fedsplit.errors import ErrorCollector, InputError, SettingError, check_all, shortened
from fedsplit.settings.config import OPTIONS, SECTIONS, SETTINGS, SEVERAL, Config
from fedsplit.settings.documents import build, by_key, dotted, suggest
from fedsplit.settings.fields import Setting

MAY_DIFFER = (
    "resume",
    "rounds",
    "patience",
    "sinks",
    "checkpoint.every",
    "checkpoint.keep",
    "engine",
    "workers",
    "threads",
    "timeout",
    "startup_deadline",
    "quorum",
    "max_failures",
    "round_deadline",
    "device",
    "trunk.threads",
    "trunk.device",
    "trunk.resources",
    "trunk.label",
    "client.resources",
    "client.label",
    "ray.address",
    "ray.wait",
    "ray.ship",
    "data.at",
)
"""Settings that may change when a run is resumed."""

REPEATABLE = ("sinks", "metric")
"""Lists whose flag may be given several times. Each flag adds to the list."""


DEBUG = "--debug"
"""Flag of every command: an error is shown with its traceback."""

Options = dict[str, dict[str, Any]]
"""Keyword arguments for a class, by the setting that names the class."""


class TakesArguments(Protocol):
    """A parser of argparse, or a group of arguments in one."""

    def add_argument(self, *flags: str, **keywords: Any) -> argparse.Action:
        """Adds an argument."""


def read_toml(path: Path) -> tuple[dict[str, object], Options]:
    """Reads a configuration file.

    Args:
        path: A TOML file.

    Returns:
        The settings by dotted name, and the options of strategy, objective, metrics and sinks.

    Raises:
        SettingError: The file cannot be read, or is not TOML.

    Example:
        >>> read_toml(Path("nowhere.toml"))
        Traceback (most recent call last):
        fedsplit.errors.SettingError: config: nowhere.toml is not possible; allowed: a TOML file that can be read \
(No such file or directory)
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingError("config", path, f"a TOML file that can be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise SettingError("config", path, f"a TOML file ({error})") from None
    options = {setting: document.pop(table, {}) for setting, table in OPTIONS.items()}
    for setting, values in options.items():
        if not isinstance(values, dict):
            raise SettingError(OPTIONS[setting], values, "a table")
        if setting in SEVERAL:
            options[setting] = by_key(values)
    return dotted(document), options


class Parser(argparse.ArgumentParser):
    """Argument parser that raises an error of one line, where argparse prints its usage and exits.

    Every parser has the flag `--debug`, which `fedsplit.commands.exit_codes.exit_code` looks for.
    """

    def __init__(self, **keywords: Any) -> None:
        """Makes a parser; see `argparse.ArgumentParser` for the keyword arguments."""
        super().__init__(**keywords)
        # Without a default, as a parser of a subcommand would overwrite what the parser above it has read.
        self.add_argument(DEBUG, action="store_true", default=argparse.SUPPRESS, help="show tracebacks of errors")

    def without_empty_flags(self, words: Sequence[str]) -> tuple[list[str], list[InputError]]:
        """Takes out the flags that lack their value, of which argparse would report the first alone.

        Args:
            words: The command line.

        Returns:
            The other words, and an error for each flag that was taken out.

        Example:
            >>> words, errors = make_parser().without_empty_flags(["--clients", "--rounds", "3", "--lr"])
            >>> words, [str(error) for error in errors]
            (['--rounds', '3'], ['--clients: expected a value after it', '--lr: expected a value after it'])
        """
        of_one_value = {flag for action in self._actions if action.nargs is None for flag in action.option_strings}
        kept: list[str] = []
        errors: list[InputError] = []
        for word, after in itertools.zip_longest(words, words[1:]):
            if word in of_one_value and (after is None or _is_flag(after)):
                errors.append(InputError(f"{word}: expected a value after it"))
            else:
                kept.append(word)
        return kept, errors

    def error(self, message: str) -> NoReturn:
        """Raises an `InputError`."""
        raise InputError(f"{message}; see --help")


def _is_flag(word: str) -> bool:
    """Returns True for a word of the command line that argparse takes for a flag: no text, and no negative number.

    Example:
        >>> [_is_flag(word) for word in ("--rounds", "--nope=3", "-1", "-", "-- a text")]
        [True, True, False, False, False]
    """
    return word.startswith("--") and word != "--" and " " not in word.partition("=")[0]


def flag_of(name: str) -> str:
    """Returns the flag of a setting.

    Example:
        >>> flag_of("train.batch_size")
        '--train.batch-size'
    """
    return f"--{name.replace('_', '-')}"


def add_setting(group: TakesArguments, name: str, default: str | None = None) -> None:
    """Adds the flag of a setting to a parser.

    The parsed text is stored under the setting's dotted name. Flags that are not on the command line store nothing.

    Args:
        group: A parser, or an argument group.
        name: Dotted name of the setting.
        default: Default to show in the help text; None for the default of the setting.

    Example:
        >>> parser = Parser()
        >>> add_setting(parser, "train.batch_size")
        >>> vars(parser.parse_args(["--batch-size", "8"]))
        {'train.batch_size': '8'}
    """
    setting = SETTINGS[name]
    flags = [flag_of(name)]
    if setting.alias:
        flags.append(setting.alias)

    keywords: dict[str, Any] = {}
    if name in REPEATABLE:
        keywords = {"action": "extend", "type": lambda text: text.split(",")}
    elif setting.python_type is bool:
        keywords = {"nargs": "?", "const": "true"}  # a switch needs no value
    group.add_argument(
        *flags,
        dest=name,
        metavar={int: "N", float: "X"}.get(setting.python_type, "NAME"),
        help=_help_of(setting, default),
        default=argparse.SUPPRESS,
        **keywords,
    )


def _help_of(setting: Setting, default: str | None) -> str:
    """Returns the help text of a flag, with the values to choose among and the default, as argparse takes it."""
    shown = setting.default if default is None else default
    if isinstance(shown, tuple):
        shown = ",".join(map(str, shown))
    choices = f": {setting.allowed.words}" if " | " in setting.allowed.words else ""
    default_text = "" if shown == "" or shown is False else f" (default: {shown})"
    text = f"{setting.help}{choices}{default_text}"
    return text.replace("%", "%%")  # argparse formats help texts with %


def make_parser() -> Parser:
    """Returns the parser of the flags of the command."""
    parser = Parser(
        prog="python -m fedsplit.simulate",
        description="Simulates a federation that fine-tunes one language model, cut in three, on text none shares.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="a TOML file of settings; flags win over the file")
    groups: dict[str, TakesArguments] = {"": parser}
    for section, cls in SECTIONS.items():
        description = cls.__doc__ or ""
        if section == "lora":
            description += " A list is separated by commas."
        groups[section] = parser.add_argument_group(section, description)
    for name, setting in SETTINGS.items():
        add_setting(groups[setting.section], name)
    one = [
        f"--{setting}.KEY VALUE sets a keyword argument of the {setting}."
        for setting in OPTIONS
        if setting not in SEVERAL
    ]
    several = [f"--{setting}.NAME.KEY VALUE sets one of the {setting} called NAME." for setting in SEVERAL]
    parser.epilog = " ".join([*one, *several])
    return parser


_BY_ALIAS = {setting.alias.removeprefix("--"): name for name, setting in SETTINGS.items() if setting.alias}
"""Settings by their second flags, such as `sinks` by `sink`."""


def options_of(rest: Sequence[str], parser: Parser, settings: Collection[str] = tuple(OPTIONS)) -> Options:
    """Parses flags such as `--strategy.KEY VALUE`.

    Args:
        rest: Arguments of the command line that are no flags of the parser.
        parser: The parser, whose flags an error suggests.
        settings: Settings whose options the command takes.

    Raises:
        InputError: A flag is unknown, or a flag has no value. All errors are reported together.
    """
    collector = ErrorCollector()
    words = []
    for argument in rest:
        words += argument.split("=", 1) if argument.startswith("--") else [argument]

    options: Options = {setting: {} for setting in settings}
    while words:
        flag = words.pop(0)
        given, _, key = flag.removeprefix("--").partition(".")
        setting = _BY_ALIAS.get(given, given)
        has_value = bool(words) and not words[0].startswith("--")
        if not flag.startswith("--") or not key or setting not in settings:
            known = [flag for action in parser._actions for flag in action.option_strings]
            collector.extend([InputError(f"there is no flag {shortened(flag)}; {suggest(flag, known)}")])
            if flag.startswith("--") and has_value:  # the value of a flag that is unknown is no error of its own
                words.pop(0)
        elif not words:
            collector.extend([InputError(f"{flag}: expected a value after it")])
        else:
            options[setting][key] = _toml_value(words.pop(0))
    collector.check()
    return options


def _toml_value(text: str) -> object:
    """Returns the value that a text stands for in TOML, such as 0.5 or true; the text itself if it is no TOML."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def parse(argv: Sequence[str] | None = None) -> Config:
    """Parses the command line, and the settings file that it names, into a checked configuration.

    Args:
        argv: Arguments; None for those of the process.

    Raises:
        InputError: A flag or a setting is unknown, or a value is not allowed. All errors are reported together.

    Example:
        >>> config = parse(["--clients", "4", "--lora.rank", "16"])
        >>> config.clients, config.lora.rank
        (4, (16,))
    """
    parser = make_parser()
    words, errors = parser.without_empty_flags(sys.argv[1:] if argv is None else argv)
    known, rest = parser.parse_known_args(words)
    values = vars(known)
    values.pop("debug", None)
    file = values.pop("config", None)

    collector = ErrorCollector()
    collector.extend(errors)
    options: Options = {}
    with collector.collecting():
        options = options_of(rest, parser)
    with collector.collecting():
        config = settle(values, options, Path(file) if file is not None else None)
    collector.check()
    return config


def settle(values: Mapping[str, object], options: Options, file: Path | None = None) -> Config:
    """Makes a checked configuration from values and a file.

    Args:
        values: Settings by dotted name. They win over the file. With `resume`, the file is the run's `config.toml`.
        options: Keyword arguments by setting, as in `OPTIONS`. They win over the file, too.
        file: A TOML file; None for the defaults. With `resume`, it may be the run's own.

    Raises:
        InputError: A name is unknown, a value is not allowed, or a setting cannot change in a run that goes on. All
            errors are reported together.

    Example:
        >>> settle({"clients": 4, "train.lr": "3e-4"}, {}).train.lr
        0.0003
    """
    run = values.get("resume")
    if run:
        own_file = Path(str(run)) / "config.toml"
        is_own = file is not None and file.exists() and own_file.exists() and file.samefile(own_file)
        _check_unchanged(values, options, None if is_own else file, run)
        file = own_file

    collector = ErrorCollector()
    file_values: dict[str, object] = {}
    file_options: Options = {}
    if file is not None:
        with collector.collecting():
            file_values, file_options = read_toml(file)
    if run and "sinks" in values:  # other sinks than those that the run had, which take other options
        file_options["sinks"] = {}
    merged = {setting: {**file_options.get(setting, {}), **options.get(setting, {})} for setting in OPTIONS}
    with collector.collecting():
        config = build({**file_values, **values}, *merged.values())
    collector.check()
    return config


def _check_unchanged(values: Mapping[str, object], options: Options, file: Path | None, run: object) -> None:
    """Makes sure that a run can go on, and that only settings are set that may differ.

    Raises:
        InputError: There is no such run, or another setting is set.
    """
    if not (Path(str(run)) / "config.toml").is_file():
        raise SettingError("resume", run, "the folder of a run, with its config.toml")
    changed = [name for name in values if name not in MAY_DIFFER]
    fixed = {setting: keywords for setting, keywords in options.items() if setting not in MAY_DIFFER}
    changed += [f"{setting}.{name}" for setting, keywords in fixed.items() for name in keywords]
    if file is not None:
        changed.insert(0, "config")
    may = ", ".join(MAY_DIFFER[1:])
    check_all(InputError(f"{name} cannot be set for a run that goes on; only {may} may differ") for name in changed)
