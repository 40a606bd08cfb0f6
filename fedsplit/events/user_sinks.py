"""Sinks of the user's, by the names that `--sink` gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedsplit.errors import SettingError
from fedsplit.events.sink import Sink
from fedsplit.loading import OWN, Kind, check_options, make, name_of, options_by_name

SINK = Kind("sinks", dict, OWN)
"""Sinks, for `--sink`; all of them are the user's."""


def check_sinks(names: Sequence[str], options: Mapping[str, Any] | None = None) -> None:
    """Makes sure that the classes of sinks are there and take their options, without making a sink.

    A sink may open files as it is made.

    Args:
        names: `path/to/mine.py:MySink`, or `module:Class`, of each sink.
        options: Keyword arguments from the user, by NAME.KEY, such as `MySink.project`.

    Raises:
        SettingError: A name is none, there is no such class, its module cannot be imported, or an option is unknown.
    """
    by_name = options_by_name(SINK, names, options or {})
    for name in names:
        check_options(SINK, name, by_name[name_of(name)], f"sinks.{name_of(name)}")


def make_sinks(
    names: Sequence[str],
    options: Mapping[str, Any] | None = None,
) -> list[Sink]:
    """Makes the sinks of the user's, in the order of their names.

    Args:
        names: As for `check_sinks`.
        options: As for `check_sinks`. A class that is named twice gets the same options twice.

    Raises:
        SettingError: As for `check_sinks`; or a class wants other arguments, raises, or is no sink.

    Example:
        >>> make_sinks(["collections:Counter"])
        Traceback (most recent call last):
        fedsplit.errors.SettingError: sinks: collections:Counter is not possible; allowed: a class with the methods \
handle and close
    """
    by_name = options_by_name(SINK, names, options or {})
    sinks = []
    for name in names:
        sink = make(SINK, name, by_name[name_of(name)], {}, f"sinks.{name_of(name)}")
        if not isinstance(sink, Sink):
            raise SettingError("sinks", name, "a class with the methods handle and close")
        sinks.append(sink)
    return sinks
