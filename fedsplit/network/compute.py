"""Compute times of the virtual clock, from stated speeds or a recorded profile: the same on every machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from fedsplit.errors import SettingError, shortened
from fedsplit.settings.validators import COMPUTE_TABLE

Task = Literal["bottom-forward", "bottom-backward", "trunk-forward", "trunk-backward", "top-forward", "top-backward"]
"""A part's computation for one message."""

TASKS: tuple[Task, ...] = (
    "bottom-forward",
    "bottom-backward",
    "trunk-forward",
    "trunk-backward",
    "top-forward",
    "top-backward",
)


class Compute(Protocol):
    """Compute times of all parts, on a client with the compute factor 1 and on the trunk."""

    def seconds(self, task: Task, rows: int, length: int) -> float:
        """Returns the seconds of a task.

        Args:
            task: The task.
            rows: Sequences B of the message.
            length: Positions T of a sequence, virtual tokens included.
        """
        ...


Operations = Callable[[Task, int, int], float]
"""Floating-point operations of a task, by task, rows and length."""


@dataclass(frozen=True)
class StatedCompute:
    """Compute times from numbers of operations and stated speeds.

    Attributes:
        operations: Returns the floating-point operations of a task.
        client_speed: Operations a second of a client with the compute factor 1.
        trunk_speed: Operations a second of the trunk.

    Example:
        >>> compute = StatedCompute(lambda task, rows, length: 1e9 * rows, client_speed=1e12, trunk_speed=1e13)
        >>> compute.seconds("top-forward", rows=4, length=128), compute.seconds("trunk-forward", rows=4, length=128)
        (0.004, 0.0004)
    """

    operations: Operations
    client_speed: float
    trunk_speed: float

    def seconds(self, task: Task, rows: int, length: int) -> float:
        """Returns the operations of a task, divided by the speed of its party."""
        speed = self.trunk_speed if task.startswith("trunk") else self.client_speed
        return self.operations(task, rows, length) / speed


@dataclass(frozen=True)
class RecordedCompute:
    """Compute times that were measured once.

    Attributes:
        seconds_of_token: Seconds of each task for one position of one sequence.

    Example:
        >>> RecordedCompute({"top-forward": 0.001}).seconds("top-forward", rows=2, length=8)
        0.016
    """

    seconds_of_token: Mapping[str, float]

    def seconds(self, task: Task, rows: int, length: int) -> float:
        """Returns the seconds of a task, in proportion to its positions."""
        return self.seconds_of_token[task] * rows * length


MOST_SECONDS = 3600.0
"""Largest compute time of one token, in seconds."""


def read_recorded(tables: str) -> RecordedCompute:
    """Reads a recorded profile: the seconds of each task for one token, under `seconds_a_token`.

    Args:
        tables: Tables of a TOML file as JSON, as the setting holds them.

    Raises:
        SettingError: The tables lack a task, or have a value that is no time.

    Example:
        >>> read_recorded("{}")
        Traceback (most recent call last):
        fedsplit.errors.SettingError: network.compute: a file with nothing is not possible; allowed: a TOML file \
with a table seconds_a_token of bottom-forward, bottom-backward, trunk-forward, trunk-backward, top-forward, \
top-backward
    """
    setting = "network.compute"
    document = json.loads(tables)
    table = document.get(COMPUTE_TABLE)
    if not isinstance(table, dict) or set(table) != set(TASKS):
        given = ", ".join(table) if isinstance(table, dict) else ", ".join(document)
        named = f"a table {COMPUTE_TABLE} with" if isinstance(table, dict) else "a file with"
        words = f"a TOML file with a table {COMPUTE_TABLE} of {', '.join(TASKS)}"
        raise SettingError(setting, f"{named} {shortened(given)}", words)
    for task, value in table.items():
        # `true` of TOML is an int in Python.
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= MOST_SECONDS:
            words = f"a number of seconds from 0 to {MOST_SECONDS:g} for one token"
            raise SettingError(f"{setting}, {task}", shortened(value), words)
    return RecordedCompute({task: float(value) for task, value in table.items()})
