"""A federation in one process: Flower's apps and our loop, without Flower's engine and without Ray.

Starting these takes half of a short run's time. Where a run's result does not depend on the number of processes, as
under `--trunk.schedule copies`, this gives what the command gives with one thread a process, to the bit.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedsplit.adaptation.adapting import adapt, bare_parts
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
from fedsplit.optimization.own_stage import stage_maker
from fedsplit.trunk.dispatch import Dispatcher
from fedsplit.trunk.memory import peak_memory, resident_memory
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.trunk.server import TrunkServer
from fedsplit.wire.codecs import make_codec
from fedsplit.wire.packets import Packet


class LocalTrunk:
    """A dispatcher and its trunk with what their actor and handle add; time passes only when nothing else can."""

    def __init__(self, config: Config, run: str = "") -> None:
        (part,) = bare_parts(config, ["trunk"])
        adapt(part, config)
        self.now = 0.0
        codec, schedule = make_codec(config.wire.codec), config.trunk.schedule
        clock, train, seed = lambda: self.now, config.train, config.seed
        stage = stage_maker(config) if SCHEDULES[schedule].personal else None
        how: dict[str, Any] = {"lease": config.trunk.lease, "clock": clock, "stage": stage}
        self.server = TrunkServer(part, codec, schedule, train, seed, run=run, incarnation="first", **how)
        self.dispatcher = Dispatcher(self.server, config.trunk, clock)
        self.begin, self.leave, self.end_round = self.dispatcher.begin, self.dispatcher.leave, self.dispatcher.end_round
        self.fold = self.server.fold
        for method in ("assign", "copies", "read", "write", "moments", "restore"):
            setattr(self, method, getattr(self.server.learners, method))

    def send(self, packet: Packet) -> Callable[[], Packet]:
        answers: list[Any] = []
        self.dispatcher.submit(packet, answers.append)

        def wait() -> Packet:
            while not answers:
                if not self.dispatcher.advance():
                    wakes = self.dispatcher.wakes_at()
                    assert wakes is not None, "nothing will ever answer"
                    self.now = max(self.now, wakes)
            if isinstance(answers[0], Exception):
                raise answers[0]
            return answers[0]

        return wait

    def status(self) -> dict[str, Any]:
        return {
            "incarnation": "first",
            "least_memory": 0,
            "traffic": dict(self.server.traffic),
            "peak_memory": peak_memory(),
            "resident_memory": resident_memory(),
            "pending": len(self.server.steps),
            "parameters": self.server.count(),
        }


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
    trunk, find = LocalTrunk(config, run), client_app.find_trunk
    client_app.find_trunk = lambda name: trunk  # type: ignore[assignment,return-value]
    try:
        yield trunk
    finally:
        client_app.find_trunk = find


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
