"""Command line: turns flags, and the settings file that they name, into a configuration."""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fedsplit.errors import InputError, SettingError
from fedsplit.settings.config import LEAVES, OPTIONS, SECTIONS, Config
from fedsplit.settings.documents import build, dotted, suggest

MAY_DIFFER = (
    "resume",
    "rounds",
    "patience",
    "sinks",
    "engine",
    "workers",
    "threads",
    "timeout",
    "quorum",
    "max_failures",
    "round_deadline",
    "device",
    "trunk.threads",
    "trunk.device",
)
"""Settings that may change when a run is resumed."""

REPEATABLE = ("sinks", "metric")
"""Lists whose flag may be given several times, each adding to the list."""


Options = dict[str, dict[str, Any]]
"""By setting that names a class, keyword arguments for the class."""


def read_toml(path: Path) -> tuple[dict[str, object], Options]:
    """Reads a configuration file.

    Args:
        path: A TOML file.

    Returns:
        The settings by dotted name, and the options of strategy and objective.

    Raises:
        SettingError: The file cannot be read or is not TOML.
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
    return dotted(document), options


class Parser(argparse.ArgumentParser):
    """Argument parser that raises errors of one line, and does not print its usage."""

    def error(self, message: str) -> NoReturn:
        """Raises an `InputError`."""
        raise InputError(f"{message}; see --help")


def flag_of(name: str) -> str:
    """Returns the flag of a setting.

    Example:
        >>> flag_of("train.batch_size")
        '--train.batch-size'
    """
    return f"--{name.replace('_', '-')}"


def add_setting(group: Any, name: str, default: str | None = None) -> None:
    """Adds the flag of a setting to a parser.

    The parsed text is stored under the setting's dotted name. A flag that is not given is not stored.

    Args:
        group: A parser, or an argument group.
        name: Dotted name of the setting.
        default: Default to show in the help text; None for the default of the setting.
    """
    leaf, kind = LEAVES[name]
    flags = [flag_of(name)]
    if leaf.metadata["alias"]:
        flags.append(leaf.metadata["alias"])

    shown = leaf.default if default is None else default
    if isinstance(shown, tuple):
        shown = ",".join(map(str, shown))
    allowed = leaf.metadata["allowed"].words
    choices = f": {allowed}" if " | " in allowed else ""
    default_text = "" if shown == "" or shown is False else f" (default: {shown})"
    text = (leaf.metadata["help"] + choices + default_text).replace("%", "%%")

    metavar = {int: "N", float: "X"}.get(kind, "NAME")
    switch: dict[str, Any] = {"nargs": "?", "const": "true"} if kind is bool else {}
    if name in REPEATABLE:
        switch = {"action": "extend", "type": lambda text: text.split(",")}
    group.add_argument(*flags, dest=name, metavar=metavar, help=text, default=argparse.SUPPRESS, **switch)


def make_parser() -> Parser:
    """Returns the parser of the flags of the command."""
    parser = Parser(
        prog="python -m fedsplit.simulate",
        description="Simulates a federation that fine-tunes one language model, cut in three, on text none shares.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="a TOML file of settings; flags win over it")
    groups: dict[str, Any] = {"": parser}
    for name in LEAVES:
        section = name.rpartition(".")[0]
        if section not in groups:
            groups[section] = parser.add_argument_group(section, SECTIONS[section].__doc__)
        add_setting(groups[section], name)
    groups["lora"].description = (groups["lora"].description or "") + " A list is separated by commas."
    parser.epilog = " ".join(f"--{setting}.KEY VALUE sets a keyword argument of the {setting}." for setting in OPTIONS)
    return parser


def _options(rest: list[str]) -> Options:
    """Parses flags such as `--strategy.KEY VALUE` from the arguments that no other flag has taken.

    Raises:
        InputError: An argument is no such flag, or a flag has no value.
    """
    options: Options = {setting: {} for setting in OPTIONS}
    words = [word for item in rest for word in (item.split("=", 1) if item.startswith("--") else [item])]
    while words:
        flag = words.pop(0)
        setting, _, key = flag.removeprefix("--").partition(".")
        if not flag.startswith("--") or not key or setting not in OPTIONS:
            known = [flag_of(name) for name in LEAVES]
            raise InputError(f"there is no flag {flag}; {suggest(flag, known)}")
        if not words:
            raise InputError(f"{flag}: expected a value after it")
        text = words.pop(0)
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except (ValueError, RecursionError):
            value = text
        options[setting][key] = value
    return options


def parse(argv: Sequence[str] | None = None) -> Config:
    """Parses the command line, and the settings file that it names, into a checked configuration.

    Args:
        argv: Arguments; None for those of the process.

    Raises:
        InputError: A flag or a setting is unknown, or a value is not allowed.

    Example:
        >>> config = parse(["--clients", "4", "--lora.rank", "16"])
        >>> config.clients, config.lora.rank
        (4, (16,))
    """
    known, rest = make_parser().parse_known_args(argv)
    values = vars(known)
    file = values.pop("config", None)
    return settle(values, _options(rest), Path(file) if file is not None else None)


def settle(values: Mapping[str, object], options: Options, file: Path | None = None) -> Config:
    """Makes a checked configuration from values, and from the file below them.

    Args:
        values: Settings by dotted name, which win over the file. With `resume`, the file is that of the run.
        options: Keyword arguments by setting, "strategy" or "objective", which win over the file, too.
        file: A TOML file.

    Raises:
        InputError: A name is unknown, a value is not allowed, or a setting cannot change in a run that goes on.

    Example:
        >>> settle({"clients": 4, "train.lr": "3e-4"}, {}).train.lr
        0.0003
    """
    if run := values.get("resume"):
        folder = Path(str(run))
        if not (folder / "config.toml").is_file():
            raise SettingError("resume", run, "the folder of a run, with its config.toml")
        _check_unchanged(values, options, file)
        file = folder / "config.toml"
    filed, filed_options = read_toml(file) if file is not None else ({}, {})
    merged = {setting: {**filed_options.get(setting, {}), **options.get(setting, {})} for setting in OPTIONS}
    return build({**filed, **values}, merged["strategy"], merged["objective"])


def _check_unchanged(values: Mapping[str, object], options: Options, file: Path | None) -> None:
    """Makes sure that nothing is set of a run that goes on but what may differ.

    Raises:
        InputError: Something else is set.
    """
    changed = [name for name in values if name not in MAY_DIFFER]
    changed += [f"{setting}.{name}" for setting, keywords in options.items() for name in keywords]
    if file is not None:
        changed.insert(0, "config")
    if changed:
        may = ", ".join(MAY_DIFFER[1:])
        raise InputError(f"{changed[0]} cannot be set for a run that goes on; only {may} may differ")
