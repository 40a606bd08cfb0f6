"""Flags: parses the command line, and the settings file that it names, into a configuration."""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Mapping, Sequence
from os.path import isfile  # False where `Path.is_file` would raise an error, as for a name that is too long
from pathlib import Path
from typing import Any, Protocol

from fedsplit.errors import ErrorCollector, InputError, SettingError, check_all, shortened
from fedsplit.settings.command_line import Options, Parser
from fedsplit.settings.config import OPTIONS, SECTIONS, SETTINGS, SEVERAL, Config
from fedsplit.settings.documents import by_key, dotted, draft
from fedsplit.settings.drafts import Draft, without
from fedsplit.settings.fields import Setting

MAY_DIFFER = (
    "resume",
    "rounds",
    "patience",
    "sinks",
    "track",
    "report",
    "push_to_hub",
    "quiet",
    "json",
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
    "trunk.devices",
    "trunk.tensor_parallel",
    "trunk.stages",
    "trunk.resources",
    "trunk.label",
    "trunk.server",
    "trunk.token_file",
    "trunk.tls",
    "trunk.wait",
    "client.resources",
    "client.label",
    "ray.address",
    "ray.wait",
    "ray.ship",
    "data.at",
    "wire.tls",
)
"""Settings that may change when a run is resumed."""

REPEATABLE = ("sinks", "metric", "mods", "track")
"""Lists whose flag may be given several times. Each flag adds to the list."""


FIELDS = frozenset([*SETTINGS, *OPTIONS.values()])
"""Dotted names of all settings, and of the tables of options."""


class TakesArguments(Protocol):
    """A parser of argparse, or a group of arguments in one."""

    def add_argument(self, *flags: str, **keywords: Any) -> argparse.Action:
        """Adds an argument."""


def read_toml(path: Path) -> tuple[dict[str, object], Options]:
    """Reads a configuration file.

    Args:
        path: A TOML file.

    Returns:
        The settings by dotted name, and the options of strategy, objective, metrics and sinks. Neither is checked.

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
        raise SettingError("config", shortened(path), f"a TOML file that can be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # tomllib reads nested values by recursion
        raise SettingError("config", shortened(path), f"a TOML file ({error})") from None
    options = {setting: document.pop(table, {}) for setting, table in OPTIONS.items()}
    return dotted(document), options


def merged(lower: object, higher: Mapping[str, Any], setting: str) -> object:
    """Returns the options that belong to a setting, of which some may be given twice.

    Args:
        lower: The options as a file or a program gives them. A value that is no table is returned as it is.
        higher: Options that win over `lower`.
        setting: Name of the setting.

    Example:
        >>> merged({"rouge": {"stem": True, "order": 1}}, {"rouge.order": 2}, "metric")
        {'rouge.stem': True, 'rouge.order': 2}
    """
    if not isinstance(lower, Mapping):
        return lower
    return {**(by_key(lower) if setting in SEVERAL else lower), **higher}


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
        # Each flag brings a list, and argparse joins the lists.
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
        allow_abbrev=False,  # an abbreviation could mean another flag in the next version
        # A default here would look like a flag that was given, and win over the file.
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
    return read_draft(argv).checked()


def read_draft(argv: Sequence[str] | None = None, errors: Sequence[InputError] = ()) -> Draft:
    """Parses the command line, and the settings file that it names, into a draft, without raising the errors.

    Args:
        argv: Arguments; None for those of the process.
        errors: Errors that were found before.

    Example:
        >>> draft = read_draft(["--nonsense", "1", "--clients", "x", "--rounds", "3"])
        >>> len(draft.errors), draft.config.rounds
        (2, 3)
    """
    call = make_parser().read(argv, tuple(OPTIONS))
    values = dict(vars(call.flags))
    file = values.pop("config", None)
    draft = settle_draft(values, call.options, Path(file) if file is not None else None)
    refused = call.refused & FIELDS
    if {"config", "resume"} & call.refused:  # the file may have set every setting that no flag sets
        refused |= FIELDS - values.keys()
    collector = ErrorCollector()
    collector.extend([*errors, *call.errors, *draft.errors])
    return Draft(without(draft.config, refused), collector.errors, draft.is_default)


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
    return settle_draft(values, options, file).checked()


def settle_draft(values: Mapping[str, object], options: Options, file: Path | None = None) -> Draft:
    """Makes a draft from values and a file, as `settle` makes a configuration, without raising the errors.

    Example:
        >>> [error.setting for error in settle_draft({"clients": 0, "rounds": 0}, {}).errors]
        ['clients', 'rounds']
    """
    collector = ErrorCollector()
    run = values.get("resume")
    if run:
        own_file = Path(str(run)) / "config.toml"
        # `samefile` raises an error for a file that is missing.
        is_own = file is not None and isfile(file) and isfile(own_file) and file.samefile(own_file)
        with collector.collecting():
            _check_unchanged(values, options, None if is_own else file, run)
        # All others are refused above, and must cause no further errors.
        values = {name: value for name, value in values.items() if name in MAY_DIFFER}
        options = {setting: keywords for setting, keywords in options.items() if setting in MAY_DIFFER}
        # The settings that may not differ are those of the run's own file.
        file = own_file

    file_values: dict[str, object] = {}
    file_options: Options = {}
    unknown: set[str] = set()
    if file is not None:
        try:
            file_values, file_options = read_toml(file)
        except SettingError as error:
            unknown = {*FIELDS} - values.keys()  # the file may have set them
            if not run or isfile(file):  # a run without its file has been refused above
                collector.extend(error.errors)
    if run and "sinks" in values:  # other sinks than those that the run had, which take other options
        file_options["sinks"] = {}
    tables = {}
    for name in OPTIONS:
        lower = file_options.get(name, {})
        higher = options.get(name, {})
        tables[name] = merged(lower, higher, name)
    made = draft({**file_values, **values}, tables)
    collector.extend(made.errors)
    return Draft(without(made.config, unknown), collector.errors, made.is_default)


def _check_unchanged(
    values: Mapping[str, object],
    options: Options,
    file: Path | None,
    run: object,
) -> None:
    """Makes sure that a run can go on, and that only settings are set that may differ.

    Raises:
        InputError: There is no such run, or another setting is set.
    """
    if not isfile(Path(str(run)) / "config.toml"):
        raise SettingError("resume", shortened(run), "the folder of a run, with its config.toml")
    changed = [name for name in values if name not in MAY_DIFFER]
    if "data.at" in values:
        before = read_toml(Path(str(run)) / "config.toml")[0].get("data.at")
        if before != values["data.at"] and {"label", "site"} & {before, values["data.at"]}:
            words = "under label and site, the clients' nodes keep the clients' state"
            raise InputError(f"data.at cannot be set for a run that goes on: {words}")
    fixed = {setting: keywords for setting, keywords in options.items() if setting not in MAY_DIFFER}
    changed += [f"{setting}.{name}" for setting, keywords in fixed.items() for name in keywords]
    if file is not None:
        changed.insert(0, "config")
    may = ", ".join(MAY_DIFFER[1:])
    check_all(InputError(f"{name} cannot be set for a run that goes on; only {may} may differ") for name in changed)
