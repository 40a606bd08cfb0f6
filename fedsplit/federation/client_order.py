"""In which order clients begin a round, and how many train at once."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

from fedsplit.seeds import derive_seed
from fedsplit.settings.config import Config
from fedsplit.trunk.schedules import is_deterministic


def takes_turns(config: Config) -> bool:
    """Whether the order of steps must be fixed, since it decides the result."""
    trunk = config.trunk
    return config.deterministic and not is_deterministic(trunk.schedule, trunk.every)


def groups_of(config: Config, round: int, clients: Iterable[int], steps: Callable[[int], int]) -> list[list[int]]:
    """Returns the clients in the order in which they begin a round, in groups that train at once.

    Where processes play the clients and no order is promised, the clients with the most local steps begin: everybody
    would wait for a long one that began last.

    Args:
        config: The run's; its seed decides an order that is random.
        round: The round, from 1.
        clients: Those that train in it.
        steps: Returns the number of a client's local steps.

    Example:
        >>> from fedsplit.settings.documents import build
        >>> groups_of(build({}), 1, range(3), {0: 5, 1: 9, 2: 7}.__getitem__)
        [[1, 2, 0]]
    """
    ordered = sorted(clients)
    turns = takes_turns(config)
    if config.trunk.order == "random":
        random.Random(derive_seed(config.seed, "order", round)).shuffle(ordered)
        if not turns and config.engine != "local":
            ordered.sort(key=steps, reverse=True)  # keeps the drawn order of those with equally many
    size = config.trunk.group if turns else max(1, len(ordered))
    return [ordered[begin : begin + size] for begin in range(0, len(ordered), size)]
