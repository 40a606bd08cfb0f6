"""The order in which clients begin a round, and the groups that train at the same time."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

from fedsplit.seeds import derive_seed
from fedsplit.settings.config import Config
from fedsplit.settings.sections import TrunkSettings
from fedsplit.trunk.schedules import SCHEDULES, is_deterministic


def takes_turns(config: Config) -> bool:
    """Returns True if the order of steps must be fixed, since the result depends on the order."""
    trunk = config.trunk
    return config.deterministic and not is_deterministic(trunk.schedule, trunk.every)


def others_wait(trunk: TrunkSettings) -> bool:
    """Returns True if the steps of some clients may wait for a client that has not left the round.

    Otherwise a client need not tell the trunk that it leaves: the end of the round does.

    Example:
        >>> others_wait(TrunkSettings(schedule="batched")), others_wait(TrunkSettings(schedule="shared"))
        (True, False)
    """
    schedule = SCHEDULES[trunk.schedule]
    return schedule.gathers or schedule.sums or trunk.sync == "step"


def groups_of(
    config: Config,
    round: int,
    clients: Iterable[int],
    steps: Callable[[int], int],
) -> list[list[int]]:
    """Returns groups of clients. The groups train one after the other, and the clients of a group at the same time.

    Under engines with client processes, and without a promised order, clients with the most local steps come first.
    Otherwise a client with many steps might begin last, and all would wait.

    Args:
        config: Configuration of the run. The seed decides a random order.
        round: The round, from 1.
        clients: Clients that train in the round.
        steps: Returns the number of a client's local steps.

    Example:
        >>> from fedsplit.settings.documents import build
        >>> groups_of(build({}), 1, range(3), {0: 5, 1: 9, 2: 7}.__getitem__)
        [[1, 2, 0]]
    """
    # From a fixed order, so that the shuffle below depends on the seed alone.
    ordered = sorted(clients)
    turns = takes_turns(config)
    if config.trunk.order == "random":
        random.Random(derive_seed(config.seed, "order", round)).shuffle(ordered)
        # The engine `local` plays one client after the other, so that no order of them saves time.
        if not turns and config.engine != "local":
            ordered.sort(key=steps, reverse=True)  # a stable sort: equal numbers keep the drawn order
    size = config.trunk.group if turns else max(1, len(ordered))
    return [ordered[begin : begin + size] for begin in range(0, len(ordered), size)]
