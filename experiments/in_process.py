"""A federation in one process: Flower's apps and our loop, without Flower's engine and without Ray.

Starting these takes half of a short run's time. Where a run's result does not depend on the number of processes, as
under `--trunk.schedule copies`, this gives what the command gives with one thread a process, to the bit.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedsplit.client.heldout import shards_of
from fedsplit.config import Config
from fedsplit.corpora.shards import on_disks
from fedsplit.federation import client_app
from fedsplit.federation.checkpoint import RunFolder
from fedsplit.federation.manifest import content_of
from fedsplit.federation.server_app import Federation
from fedsplit.federation.workload import workloads
from fedsplit.model.families import read_facts
from fedsplit.model.sources import about, weights
from fedsplit.trunk import local
from fedsplit.trunk.local import LocalTrunk


class LocalGrid:
    """Delivers messages to the ClientApp at once; nodes are not in the order of their partitions."""

    def __init__(self, clients: int) -> None:
        self.partitions = {1000 - client: client for client in range(clients)}
        self._replies: dict[str, Message] = {}

    def get_node_ids(self) -> list[int]:
        return sorted(self.partitions)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            ids.append(message.metadata.message_id)
            self._replies[ids[-1]] = self.deliver(message)
        return ids

    def deliver(self, message: Message) -> Message:
        """What the client answers."""
        node = message.metadata.dst_node_id
        context = Context(1, node, {"partition-id": self.partitions[node]}, RecordDict(), {})
        try:
            return client_app.app(message, context)
        except Exception as error:  # noqa: BLE001  # as Flower's engine does
            return Message(Error(1, f"{type(error).__name__}: {error}"), reply_to=message)

    def pull_messages(self, ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(one) for one in sorted(ids) if one in self._replies]


class Silent:
    """A watcher that says nothing."""

    def phase(self, text: str, done: int, of: int) -> None:
        pass

    def line(self, text: str) -> None:
        pass


def name_run() -> None:
    """Sets what Flower's engine does: messages name the run that they belong to."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


@contextlib.contextmanager
def trunk_of(config: Config, run: str) -> Iterator[LocalTrunk]:
    """A trunk in this process, which clients find as long as the context lasts."""
    with local.named(LocalTrunk(config, run), run) as trunk:
        yield trunk


def federate(config: Config, out: Path, strategy: Any, watcher: Any) -> Federation:
    """Runs a whole federation, with one thread.

    Args:
        config: Its configuration.
        out: The run's folder.
        strategy: Ours or Flower's.
        watcher: Who is told.
    """
    run, facts = str(uuid4()), read_facts(about(config))
    name_run()
    with trunk_of(config, run) as trunk:
        shards = shards_of(config)
        content = content_of(shards, about(config), weights(config))
        folder = RunFolder(out, config, facts.family, facts.blocks, content)
        work, started = workloads(config, shards), time.perf_counter()
        federation = Federation(config, trunk, run, 1, 1, work, strategy, folder, watcher, started)  # type: ignore[arg-type]
        with on_disks(folder.clients, shards):
            federation.run(LocalGrid(config.clients))  # type: ignore[arg-type]
    return federation
