"""Doors to a trunk: finds the trunk of a run by its name, in this process or in a Ray cluster.

To add a door, write a module with a `TrunkPort` and add a line to `find_trunk`.
"""

from __future__ import annotations

from fedsplit.errors import SettingError
from fedsplit.settings.config import Config
from fedsplit.trunk import local
from fedsplit.trunk.port import TrunkPort


def find_trunk(name: str) -> TrunkPort:
    """Returns the trunk with a name, from this process or else from the Ray cluster.

    Raises:
        TrunkLost: No trunk has the name.
    """
    trunk = local.find_trunk(name)
    if trunk is not None:
        return trunk

    from fedsplit.trunk import actor  # not at the top: only the engine `ray` needs Ray

    return actor.find_trunk(name)


def check_memory(config: Config, trunk: TrunkPort) -> None:
    """Checks that the trunk's memory budget suffices for a step. Only a loaded trunk can measure the need for memory.

    Raises:
        SettingError: The budget does not suffice for a single step.
    """
    limit = config.trunk.memory_bytes
    if limit is None:
        return
    least = trunk.status().least_memory
    if least > limit:
        words = f"at least {-(-least // 10**6)}MB, for this trunk and one step at a time"
        raise SettingError("trunk.memory", config.trunk.memory, words)
