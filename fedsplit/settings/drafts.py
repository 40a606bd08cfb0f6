"""Drafts: configurations in which settings may be wrong. The other settings of a draft can still be checked."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TypeVar

from fedsplit.errors import ErrorCollector, InputError, UnknownValue
from fedsplit.settings.config import Config

Owner = TypeVar("Owner")
"""Class of an object with values: `Config`, the class of a section, or `argparse.Namespace`."""


@dataclass(frozen=True)
class Draft:
    """A configuration in which settings may be wrong.

    Attributes:
        config: The configuration. Reading a wrong setting raises `UnknownValue`.
        errors: The errors found so far, in the order in which a user reads them.
        is_default: True if the user set no other setting than the wrong ones.

    Example:
        >>> draft = Draft(without(Config(rounds=3), ["clients"]), (InputError("clients: x is not possible"),))
        >>> draft.config.rounds
        3
        >>> draft.config.clients
        Traceback (most recent call last):
        fedsplit.errors.UnknownValue: clients: the value was refused
    """

    config: Config
    errors: tuple[InputError, ...] = ()
    is_default: bool = False

    def checked(self, check_more: Callable[[Config], object] = lambda config: None) -> Config:
        """Returns the configuration if no setting is wrong.

        Args:
            check_more: Further checks of a configuration. If a setting is wrong, they are called for the valid
                settings, so that a user reads all errors at once. Otherwise they are left to the caller.

        Raises:
            InputError: A setting is wrong. All errors are reported together.
        """
        if not self.errors:
            return self.config
        collector = ErrorCollector()
        collector.extend(self.errors)
        if not self.is_default:  # defaults are right: no library has to be loaded to find that out
            with collector.collecting():
                check_more(self.config)
        collector.check()
        raise AssertionError("a collector with errors raises them")


def without(config: Config, names: Collection[str]) -> Config:
    """Returns a copy of a configuration in which settings have no value, so that no check can depend on them.

    A default in place of a wrong value would give errors that only follow from the default.

    Args:
        config: The configuration.
        names: Dotted names of the settings without a value. Reading one of them raises `UnknownValue`.

    Example:
        >>> without(Config(), ["train.lr"]).train.batch_size
        4
    """
    fields_of: dict[str, list[str]] = {"": []}
    for name in names:
        section, _, field = name.rpartition(".")
        fields_of.setdefault(section, []).append(field)

    copy = unreadable(config, fields_of.pop(""))
    for section, fields in fields_of.items():
        # As `Config` is frozen, its attributes cannot be assigned.
        vars(copy)[section] = unreadable(getattr(config, section), fields, f"{section}.")
    return copy


def unreadable(owner: Owner, names: Collection[str], prefix: str = "") -> Owner:
    """Returns a copy of an object some of whose attributes have no value.

    Args:
        owner: The object.
        names: Names of the attributes. Reading one of them raises `UnknownValue`.
        prefix: What the error writes before the name.

    Example:
        >>> from argparse import Namespace
        >>> flags = unreadable(Namespace(client=None, run="runs/demo"), ["client"])
        >>> flags.run
        'runs/demo'
        >>> flags.client
        Traceback (most recent call last):
        fedsplit.errors.UnknownValue: client: the value was refused
    """
    if not names:
        return owner
    cls = type(owner)
    properties = {name: _unknown(prefix + name) for name in names}
    # A property of the class wins over the value in the object's own dictionary.
    subclass = type(cls.__name__, (cls,), properties)
    copy: Owner = object.__new__(subclass)  # not by its class, which would check the settings, and read them
    vars(copy).update(vars(owner))
    return copy


def _unknown(name: str) -> property:
    """Returns a property that raises `UnknownValue` for the setting `name`."""

    def read(_: object) -> None:
        raise UnknownValue(name)

    return property(read)
