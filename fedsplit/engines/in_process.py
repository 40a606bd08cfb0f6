"""The engine in this process: no Ray, and no Flower unless one of Flower's own strategies is asked for.

Clients train one after the other, and the trunk computes in between. Where a schedule is deterministic, the adapters
are those of every other engine, to the bit.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from fedsplit.corpora.partition import shards_of
from fedsplit.corpora.shards import on_disks
from fedsplit.engines.planning import Plan
from fedsplit.events import Sink
from fedsplit.events.emitter import Emitter
from fedsplit.events.run_files import MetricsFile, SummaryFile
from fedsplit.federation.checkpoint import RunFolder
from fedsplit.federation.client_service import ClientService
from fedsplit.federation.clients import ClientNode, FederationFailed, Interrupted, check_introductions
from fedsplit.federation.federation import Federation, Job
from fedsplit.federation.manifest import content_of
from fedsplit.federation.messages import Answer, Briefing, Failure, Introduce, Request
from fedsplit.federation.replies import Introduction, read_introduction
from fedsplit.federation.workload import workloads
from fedsplit.model.families import read_facts
from fedsplit.model.sources import config_folder, weights_folder
from fedsplit.objects import NOTHING, Objects
from fedsplit.optimization.own_stage import stage_maker
from fedsplit.settings.config import Config
from fedsplit.trunk.local import LocalTrunk
from fedsplit.watchdog import Watchdog
from fedsplit.wire.packets import Packet
from fedsplit.wire.transport import PendingAnswer


@dataclass
class LocalClients:
    """The clients of a federation, played one after the other.

    Attributes:
        service: Answers requests.
        stop: Ends the run before the next client.
        watchdog: Ends the wait for a client that hangs.
        nodes: The clients by number; empty before `meet`.
    """

    service: ClientService
    stop: threading.Event
    watchdog: Watchdog
    nodes: list[ClientNode] = field(default_factory=list)
    grid: None = None

    def meet(self, briefing: Briefing, count: int) -> Iterator[Introduction]:
        """Has each client introduce itself."""
        found = []
        for client in range(count):
            answer = self.answer(Introduce(briefing, client))
            if isinstance(answer, Failure):
                raise FederationFailed(f"client {client} could not load its parts: {answer.reason}")
            introduction = read_introduction(answer)
            found.append(introduction)
            yield introduction
        check_introductions(found, count)
        self.nodes[:] = [ClientNode(one.client + 1, one.name) for one in found]

    def ask(self, requests: Iterable[Request], until: float | None = None) -> Iterator[Answer]:
        """Answers each request in turn; after the deadline no client begins."""
        left = iter(requests)
        while until is None or time.monotonic() < until:
            request = next(left, None)
            if request is None:
                return
            yield self.answer(request)

    def abandon(self) -> None:
        """Does nothing: no request is under way between two calls."""

    def answer(self, request: Request) -> Answer:
        """Answers one request."""
        if self.stop.is_set():
            raise Interrupted
        with self.watchdog.doing(f"client {request.client}"):
            return self.service.answer(request)


@dataclass(frozen=True)
class Heard:
    """A client's way to the trunk, on which every packet is a sign of life.

    Attributes:
        trunk: The trunk.
        beat: Notes a sign of life.
    """

    trunk: LocalTrunk
    beat: Callable[[], None]

    def send(self, packet: Packet) -> PendingAnswer:
        """Sends a packet without waiting; the function that is returned waits for the answer."""
        self.beat()
        return self.trunk.send(packet)

    def leave(self, client: int) -> None:
        """Ends the round of a client."""
        self.trunk.leave(client)


class LocalSession:
    """The trunk and the clients of a run in this process.

    Attributes:
        trunk: The trunk.
        name: Name of the trunk and of the run.
    """

    def __init__(self, config: Config, objects: Objects = NOTHING) -> None:
        """Loads the trunk.

        Args:
            config: Configuration of the run.
            objects: Strategy, objective and metrics, where they are not to be loaded by their names.
        """
        self._config = config
        self._objects = objects
        self.name = str(uuid4())
        self.trunk = self._load()

    def _load(self) -> LocalTrunk:
        stage = stage_maker(self._config, self._objects.strategy)
        return LocalTrunk(self._config, self.name, incarnation=self.name, stage=stage)

    def renew(self) -> None:
        """Closes the trunk, and loads another one."""
        self.trunk.close()
        self.name = str(uuid4())
        self.trunk = self._load()

    def play(self, federation: Federation) -> None:
        """Runs a federation to its end.

        Raises:
            Hung: A client, or the strategy, gives no sign of life.
        """
        watchdog = federation.watchdog
        service = ClientService(lambda name: Heard(self.trunk, watchdog.beat), self._objects)
        with watchdog.looking():
            federation.run(LocalClients(service, federation.stop, watchdog))


@contextlib.contextmanager
def running(config: Config, plan: Plan, objects: Objects = NOTHING) -> Iterator[LocalSession]:
    """Loads the trunk in this process; torch has its former number of threads again at the end.

    Args:
        config: Configuration of the run.
        plan: Threads of clients and trunk.
        objects: Strategy, objective and metrics, where they are not to be loaded by their names.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(plan.trunk_threads)
    try:
        yield LocalSession(config, objects)
    finally:
        torch.set_num_threads(threads)


def federate(config: Config, out: Path, strategy: Any, *sinks: Sink) -> Federation:
    """Runs a whole federation here, in a folder of its own, with one thread and the settings as they are.

    Args:
        config: Configuration of the run.
        out: Folder of the run.
        strategy: Strategy of ours or of Flower's.
        sinks: Receive the events of the run, beside the files of its folder.

    Returns:
        The federation, which has its summary.
    """
    started = time.perf_counter()
    facts = read_facts(config_folder(config.model))
    shards = shards_of(config)
    with running(config, Plan(1, 1, 1, 1, 1), Objects(strategy)) as session:
        content = content_of(shards, config_folder(config.model), weights_folder(config))
        folder = RunFolder(out, config, facts.family, facts.blocks, content)
        emit = Emitter([MetricsFile(out), SummaryFile(out), *sinks])
        job = Job(config, strategy, workloads(config, shards), folder, emit, started, Watchdog(config.timeout))
        federation = Federation(job, session, threads=1)
        with emit, on_disks(folder.clients, shards):
            session.play(federation)
    return federation
