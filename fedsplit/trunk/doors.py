"""Doors to a trunk: how clients find the trunk of their run, wherever it is.

A further door is a module with a `TrunkPort`, and one line here.
"""

from __future__ import annotations

from fedsplit.errors import SettingError
from fedsplit.settings.config import Config
from fedsplit.trunk import local
from fedsplit.trunk.port import TrunkPort


def find_trunk(name: str) -> TrunkPort:
    """Returns the trunk of that name: one of this process, or else one of the Ray cluster.

    Raises:
        TrunkLost: There is none.
    """
    if (trunk := local.find_trunk(name)) is not None:
        return trunk

    from fedsplit.trunk import actor  # Ray is imported only where it is needed

    return actor.find_trunk(name)


def check_memory(config: Config, trunk: TrunkPort) -> None:
    """Makes sure that the trunk's memory budget suffices; only a trunk that is loaded knows what it needs.

    Raises:
        SettingError: It does not suffice for a single step.
    """
    limit = config.trunk.memory_bytes
    if limit is None:
        return
    least = trunk.status().least_memory
    if least > limit:
        words = f"at least {-(-least // 10**6)}MB, for this trunk and one step at a time"
        raise SettingError("trunk.memory", config.trunk.memory, words)
