"""Run configuration of the Flower App, turned into the words of fedsplit's command line.

So `flwr run` and `fedsplit simulate` have the same settings, defaults, checks and messages.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from fedsplit.errors import InputError, SettingError, shortened
from fedsplit.settings.config import SETTINGS

Value = str | int | float | bool
"""A value in Flower's run configuration."""

FLOWERS_NAMES = {
    "num-server-rounds": "rounds",
    "fraction-train": "fraction",
    "fraction-evaluate": "eval.fraction",
    "local-steps": "train.steps",
    "local-epochs": "train.epochs",
    "batch-size": "train.batch_size",
    "learning-rate": "train.lr",
}
"""Setting by the name that Flower's own apps use. Every further setting has its own name, in kebab case."""

FLAGS = "flags"
"""Key with further flags of `fedsplit simulate`, as one text: Flower takes no key that pyproject.toml lacks."""

ENGINE = "flower"
"""The engine of every run under `flwr run`."""


def words_of(run_config: Mapping[str, Value], nodes: int) -> list[str]:
    """Returns the command line that a run configuration stands for.

    A value that equals the setting's default counts as not set. So `flags` may name a settings file with `--config`, or
    a run that goes on with `--resume`.

    Args:
        run_config: Values by key, such as `num-server-rounds` or `lora.rank`.
        nodes: Number of SuperNodes; the number of clients if `clients` is 0 or missing.

    Raises:
        InputError: Two keys name one setting, or the flags cannot be read.

    Example:
        >>> words_of({"num-server-rounds": 3, "lora.rank": 4, "seed": 0, "flags": "--quiet"}, nodes=2)
        ['--engine=flower', '--clients=2', '--rounds=3', '--lora.rank=4', '--quiet']
    """
    named: dict[str, str] = {}  # key by setting
    words = [f"--engine={ENGINE}"]
    flags = _split(run_config.get(FLAGS, ""))
    named_flags = [word.partition("=")[0] for word in flags]
    sets_clients = bool(run_config.get("clients", 0)) or "--clients" in named_flags
    goes_on = "--resume" in named_flags or "--config" in named_flags
    if not sets_clients and not goes_on:  # the run, or the file, has a number of its own
        # A flag would win over the number in the file.
        words.append(f"--clients={nodes}")
    for key, value in run_config.items():
        if key == FLAGS or (key == "clients" and not value):
            continue
        setting = FLOWERS_NAMES.get(key, key.replace("-", "_"))
        if setting in named:
            raise InputError(f"{named[setting]} and {key} are one setting; only one of the two may be given")
        named[setting] = key
        text = _text(value)
        # The number of clients has another default here, so that 8 is a choice.
        is_default = setting in SETTINGS and setting != "clients" and text == _text(SETTINGS[setting].default)
        if not is_default:
            words.append(f"--{setting.replace('_', '-')}={text}")
    return [*words, *flags]


def _text(value: object) -> str:
    """Returns a value as on the command line.

    Example:
        >>> _text(True), _text((4, 8)), _text(0.5)
        ('true', '4,8', '0.5')
    """
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _split(flags: object) -> list[str]:
    """Returns the words of a text as a shell would split them.

    Raises:
        SettingError: The value is no text, or a quotation mark is missing.
    """
    try:
        if isinstance(flags, str):
            return shlex.split(flags)
    except ValueError as error:
        words = f"flags of fedsplit simulate as one text ({error})"
        raise SettingError(FLAGS, shortened(flags), words) from error
    raise SettingError(FLAGS, shortened(flags), "flags of fedsplit simulate as one text")
