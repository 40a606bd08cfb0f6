"""Compute times of the virtual clock, from stated speeds or a recorded profile: the same on every machine."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from fedsplit.errors import SettingError, shortened

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


def read_recorded(path: Path) -> RecordedCompute:
    """Reads a recorded profile: a TOML file with the seconds of each task for one token, under `seconds_a_token`.

    Raises:
        SettingError: The file cannot be read, or lacks a task.

    Example:
        >>> read_recorded(Path("nowhere.toml"))
        Traceback (most recent call last):
        fedsplit.errors.SettingError: network.compute: nowhere.toml is not possible; allowed: a TOML file that can be \
read (No such file or directory)
    """
    setting, name = "network.compute", shortened(path)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingError(setting, name, f"a TOML file that can be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise SettingError(setting, name, f"a TOML file ({error})") from None
    table = document.get("seconds_a_token")
    if not isinstance(table, dict) or set(table) != set(TASKS):
        raise SettingError(setting, name, f"a TOML file with a table seconds_a_token of {', '.join(TASKS)}")
    for task, value in table.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value < math.inf:
            raise SettingError(setting, name, f"a finite number of at least 0 for {task}")
    return RecordedCompute({task: float(value) for task, value in table.items()})
