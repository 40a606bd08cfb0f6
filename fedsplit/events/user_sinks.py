"""Sinks of the user's, by the names that `--sink` gives."""

from __future__ import annotations

from collections.abc import Sequence

from fedsplit.errors import SettingError
from fedsplit.events.sink import Sink
from fedsplit.loading import OWN, Kind, find, make

SINK = Kind("sinks", dict, OWN)
"""Sinks, for `--sink`; all of them are the user's."""


def check_sinks(names: Sequence[str]) -> None:
    """Makes sure that the classes of sinks are there, without making a sink, which may open files.

    Args:
        names: `path/to/mine.py:MySink`, or `module:Class`, of each sink.

    Raises:
        SettingError: A name is none, there is no such class, or its module cannot be imported.
    """
    for name in names:
        find(SINK, name)


def make_sinks(names: Sequence[str]) -> list[Sink]:
    """Makes the sinks of the user's, in the order of their names.

    Args:
        names: As for `check_sinks`.

    Raises:
        SettingError: As for `check_sinks`; or a class wants arguments, raises, or is no sink.

    Example:
        >>> make_sinks(["collections:Counter"])
        Traceback (most recent call last):
        fedsplit.errors.SettingError: sinks: collections:Counter is not possible; allowed: a class with the methods \
handle and close
    """
    sinks = []
    for name in names:
        sink = make(SINK, name, {}, {})
        if not isinstance(sink, Sink):
            raise SettingError("sinks", name, "a class with the methods handle and close")
        sinks.append(sink)
    return sinks
