"""In which order clients begin a round, and how many train at once."""

from __future__ import annotations

import random
from collections.abc import Iterable

from fedsplit.seeds import derive_seed
from fedsplit.settings.config import Config
from fedsplit.trunk.schedules import is_deterministic


def takes_turns(config: Config) -> bool:
    """Whether the order of steps must be fixed, since it decides the result."""
    trunk = config.trunk
    return config.deterministic and not is_deterministic(trunk.schedule, trunk.every)


def groups_of(config: Config, round: int, clients: Iterable[int]) -> list[list[int]]:
    """Clients in the order in which they begin a round, in groups that train at once.

    Args:
        config: The run's; its seed decides an order that is random.
        round: The round, from 1.
        clients: Those that train in it.
    """
    ordered = sorted(clients)
    if config.trunk.order == "random":
        random.Random(derive_seed(config.seed, "order", round)).shuffle(ordered)
    size = config.trunk.group if takes_turns(config) else max(1, len(ordered))
    return [ordered[begin : begin + size] for begin in range(0, len(ordered), size)]
