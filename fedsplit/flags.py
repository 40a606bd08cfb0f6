"""The command line: flags, and the file of settings they name, to a configuration."""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from fedsplit.allowed import InputError, SettingError
from fedsplit.config import LEAVES, OPTIONS, SECTIONS, Config
from fedsplit.documents import build, dotted, suggest

MAY_DIFFER = (
    "resume",
    "rounds",
    "patience",
    "workers",
    "threads",
    "timeout",
    "device",
    "trunk.threads",
    "trunk.device",
)
"""What may be set of a run that goes on."""


Options = dict[str, dict[str, Any]]
"""By setting that names a class, keyword arguments for the class."""


def read_toml(path: Path) -> tuple[dict[str, object], Options]:
    """Reads a configuration file.

    Returns:
        The settings by dotted name, and the options.

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
    """An argument parser whose errors are one line, without usage."""

    def error(self, message: str) -> NoReturn:
        """Raises an InputError."""
        raise InputError(f"{message}; see --help")


def flag_of(name: str) -> str:
    """The flag of a setting, by its dotted name."""
    return f"--{name.replace('_', '-')}"


def add_setting(group: Any, name: str, default: str | None = None) -> None:
    """Adds the flag of a setting, whose text goes under the setting's dotted name; where it is not given, nothing does.

    Args:
        group: A parser, or a group of one.
        name: The setting's dotted name.
        default: What its help says is the default; the field's own where None.
    """
    leaf, kind = LEAVES[name]
    flags = [flag_of(name)]
    if leaf.metadata["alias"]:
        flags.append(leaf.metadata["alias"])
    own = ",".join(map(str, leaf.default)) if isinstance(leaf.default, tuple) else leaf.default
    shown = own if default is None else default
    end = "" if shown == "" or shown is False else f" (default: {shown})"
    metavar = {int: "N", float: "X"}.get(kind, "NAME")
    words = leaf.metadata["allowed"].words
    choices = f": {words}" if " | " in words else ""
    text = (leaf.metadata["help"] + choices + end).replace("%", "%%")
    values: dict[str, Any] = {"nargs": "?", "const": "true"} if kind is bool else {}
    group.add_argument(*flags, dest=name, metavar=metavar, help=text, default=argparse.SUPPRESS, **values)


def _parser() -> Parser:
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
    """Reads pairs such as `--strategy.KEY VALUE`; anything else left over is unknown."""
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
    """Reads the command line, and the file it names, into a checked configuration.

    Raises:
        InputError: Something was given wrongly.
    """
    known, rest = _parser().parse_known_args(argv)
    flags = vars(known)
    file = flags.pop("config", None)
    if run := flags.get("resume"):
        if not (Path(run) / "config.toml").is_file():
            raise SettingError("resume", run, "the folder of a run, with its config.toml")
        changed = [name for name in (*flags, *rest) if name not in MAY_DIFFER]
        if file is not None or changed:
            what = "--config" if file is not None else changed[0]
            raise InputError(
                f"{what} cannot be set for a run that goes on; only {', '.join(MAY_DIFFER[1:])} may differ"
            )
        file = Path(run) / "config.toml"
    values, in_file = read_toml(Path(file)) if file is not None else ({}, {})
    options = {setting: {**in_file.get(setting, {}), **given} for setting, given in _options(rest).items()}
    return build({**values, **flags}, options["strategy"], options["objective"])
