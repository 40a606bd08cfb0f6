"""One port to all trunks of a run: the stages of each replica, joined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from fedsplit.errors import SettingError
from fedsplit.settings.config import Config
from fedsplit.settings.validators import SPEED
from fedsplit.trunk.port import Control, Reply, TrunkPort
from fedsplit.trunk.replicated import ReplicatedTrunk
from fedsplit.trunk.spans import spans_of
from fedsplit.trunk.staged import StagedTrunk
from fedsplit.wire.packets import Packet
from fedsplit.wire.transport import PendingAnswer


def count(config: Config) -> int:
    """Returns the number of the trunk's processes that a run starts: stages of all replicas, or sharers of a trunk.

    A run that uses the trunk of a server starts none.

    Example:
        >>> from fedsplit.settings.documents import build
        >>> count(build({"cut": "1:5", "trunk.stages": "1:2:5", "trunk.replicas": 3}))
        6
    """
    if config.trunk.server:
        return 0
    return config.trunk.replicas * len(spans_of(config)) * config.trunk.tensor_parallel


def join(config: Config, trunks: Sequence[Sequence[TrunkPort]]) -> TrunkPort:
    """Returns one port to all trunks of a run.

    Args:
        config: Configuration of the run.
        trunks: The stages of each replica, from the bottom to the top.
    """
    replicas: list[TrunkPort] = []
    for stages in trunks:
        in_one_piece = len(stages) == 1
        replicas.append(stages[0] if in_one_piece else StagedTrunk(stages))
    if len(replicas) == 1:
        return replicas[0]
    return ReplicatedTrunk(replicas, config.trunk, config.clients)


def weigh(config: Config, trunk: TrunkPort) -> Config:
    """Returns the settings of a run with the weights of replicas by speed, if the settings ask for a measurement.

    Args:
        config: Configuration of the run.
        trunk: All trunks, not in use.
    """
    if config.trunk.weights != SPEED or not isinstance(trunk, ReplicatedTrunk):
        return config
    weights = ",".join(f"{speed:.3g}" for speed in trunk.speeds())
    return replace(config, trunk=replace(config.trunk, weights=weights))


class JoinedTrunks(TrunkPort):
    """All trunks of a run, called like one trunk."""

    def __init__(self, config: Config, replicas: Sequence[Sequence[TrunkPort]]) -> None:
        """Joins trunks.

        Args:
            config: Configuration of the run.
            replicas: The stages of each replica, from the bottom to the top.
        """
        self._port = join(config, replicas)
        self._trunks = replicas

    def send(self, packet: Packet) -> PendingAnswer:
        """Sends a packet, and returns a function that waits for the answer."""
        return self._port.send(packet)

    def control(self, message: Control[Reply]) -> Reply:
        """Sends a control message, and waits for the reply."""
        return self._port.control(message)

    def weigh(self, config: Config) -> Config:
        """Divides the clients by speed, if the settings ask for it, and returns the settings with the weights."""
        config = weigh(config, self._port)
        self._port = join(config, self._trunks)  # clients find their replicas by the weights
        return config


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
        megabytes = math.ceil(least / 10**6)  # rounded up, so that the named value is enough
        words = f"at least {megabytes}MB, for this trunk and one step at a time"
        raise SettingError("trunk.memory", config.trunk.memory, words)
