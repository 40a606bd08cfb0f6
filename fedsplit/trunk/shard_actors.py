"""Processes that share the trunk's blocks, as Ray actors on the node of the trunk's actor.

The trunk's actor starts the others, and owns them: Ray ends them with it. If one of them ends, the trunk's actor ends,
too. All are on one node, so that nothing but the loopback interface is between them.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedsplit.errors import first_line
from fedsplit.model.parts import Trunk
from fedsplit.settings.config import Config
from fedsplit.trunk import shard_group
from fedsplit.trunk.blocks import Blocks
from fedsplit.trunk.shard_group import join


class ShardActor:
    """A further process of a trunk that several processes share."""

    def follow(
        self,
        config: Config,
        adapter: Path | None,
        threads: int,
        file: Path,
        rank: int,
    ) -> None:
        """Does what the first process says; see `fedsplit.trunk.shard_group.follow`.

        Args:
            config: Settings of the run.
            adapter: Folder of a finished run's adapter; None for a new adapter.
            threads: Number of threads that torch may use.
            file: Path by which the processes find each other.
            rank: Number of this process.
        """
        shard_group.follow(config, adapter, threads, join(config, file, rank))


class ActorShards:
    """The further processes of a trunk, as the trunk's actor sees them."""

    def __init__(self, options: Sequence[Mapping[str, Any]], threads: int) -> None:
        """Starts nothing yet.

        Args:
            options: Options of each further actor.
            threads: Number of threads that torch may use in each.
        """
        self._options = options
        self._threads = threads

    def lead(self, config: Config, adapter: Path | None) -> tuple[Trunk, Blocks]:
        """Starts the further processes, and loads the pieces of this one; see `fedsplit.trunk.shard_group.lead`."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._actors = []
        calls = []
        with tempfile.TemporaryDirectory(prefix="fedsplit-") as folder:  # of this user's alone
            file = Path(folder, "group")
            for rank, kept in enumerate(self._options, 1):
                actor = ray.remote(ShardActor).options(**{"scheduling_strategy": here, **kept}).remote()
                self._actors.append(actor)  # Ray ends an actor without a handle
                calls.append(actor.follow.remote(config, adapter, self._threads, file, rank))
            threading.Thread(target=_watch, args=(calls,), daemon=True).start()
            return shard_group.lead(config, adapter, join(config, file, 0), _end)


def _watch(calls: Sequence[Any]) -> None:
    """Ends this process as soon as one of the others ends."""
    ended, _ = ray.wait(list(calls))  # `follow` never returns in a healthy process
    try:
        ray.get(ended[0])
    except Exception as error:  # noqa: BLE001  # of any kind: the process that raised it is no use any more
        print(f"a process of the trunk ended: {first_line(error)}", file=sys.stderr)
    _end()


def _end() -> None:
    """Ends this process, so that clients and the driver notice at once."""
    os._exit(1)
