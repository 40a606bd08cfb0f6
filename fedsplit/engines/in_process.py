"""The engine `local`, in this process: no Ray, and Flower only for a strategy of Flower.

Clients train in turn, and the trunk computes in between. Under a deterministic schedule, all engines give equal
adapters to the bit. Under further schedules, `--workers` clients can train at once, each in a thread.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedsplit.corpora.partition import shards_of
from fedsplit.corpora.shards import on_disks
from fedsplit.engines.planning import Plan
from fedsplit.engines.trunk_places import RunTrunk, place_of
from fedsplit.events import Sink
from fedsplit.events.emitter import Emitter
from fedsplit.events.run_files import MetricsFile, SummaryFile
from fedsplit.federation.checkpoint import RunFolder
from fedsplit.federation.client_service import ClientService
from fedsplit.federation.clients import ClientNode, Interrupted, RollCall
from fedsplit.federation.federation import Federation, Job
from fedsplit.federation.introductions import Introduction
from fedsplit.federation.manifest import code_of, content_of
from fedsplit.federation.messages import Answer, Briefing, Introduce, Request
from fedsplit.federation.workload import workloads
from fedsplit.model.facts import read_facts
from fedsplit.model.sources import config_folder, weights_folder
from fedsplit.objects import NOTHING, Objects
from fedsplit.optimization.own_stage import stage_maker
from fedsplit.settings.config import Config
from fedsplit.trunk.local import LocalTrunks, load_trunks
from fedsplit.trunk.port import TrunkPort
from fedsplit.trunk.workers import outcome
from fedsplit.watchdog import Watchdog
from fedsplit.wire.packets import Packet, new_incarnation
from fedsplit.wire.transport import PendingAnswer

_END_SECONDS = 5.0
"""Time that a thread has to end with the run; a step of its client ends as soon as it asks the trunk."""


class _Player(threading.Thread):
    """A thread that plays clients in turn, with a separate bottom and top.

    The thread is a daemon: user code that hangs cannot be ended, and must not keep the process alive.
    """

    def __init__(self, service: ClientService, answers: queue.SimpleQueue[Answer]) -> None:
        """Starts the thread.

        Args:
            service: Answers requests.
            answers: Takes the answers.
        """
        super().__init__(name="client", daemon=True)
        self.requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._service = service
        self._answers = answers
        self.start()

    def run(self) -> None:
        """Answers requests until a None comes."""
        while (request := self.requests.get()) is not None:
            self._answers.put(self._service.answer(request))  # an error is an answer, too: the thread lives on


class LocalClients:
    """The clients of a federation, played one after the other, or several at once in threads.

    Attributes:
        nodes: The clients by number; empty before `meet`.
        grid: None, as no Flower runs.
    """

    grid: None = None

    def __init__(self, services: Sequence[ClientService], stop: threading.Event, watchdog: Watchdog) -> None:
        """Knows no client yet.

        Args:
            services: Services, as many as clients can train at once. A single service answers in the caller's thread.
            stop: Ends the run before the next client.
            watchdog: Ends the wait for a client that hangs.
        """
        self.nodes: list[ClientNode] = []
        self.stop = stop
        self._services = services
        self._watchdog = watchdog
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._players = []
        if len(services) > 1:
            self._players = [_Player(service, self._answers) for service in services]
        self._idle = list(self._players)
        self._under_way: dict[int, _Player] = {}  # by client

    def meet(self, briefing: Briefing, count: int) -> Iterator[Introduction]:
        """Has each client introduce itself."""
        roll = RollCall(count)
        for client in range(count):
            # Node n plays client n - 1, as in `PoolGrid`.
            introduction = roll.hear(client + 1, self.answer(Introduce(briefing, client)))
            if introduction is not None:
                yield introduction
        self.nodes[:] = roll.nodes()

    def ask(self, requests: Iterable[Request], until: float | None = None) -> Iterator[Answer]:
        """Answers requests, in turn or several at once; after the deadline no client begins."""
        left = iter(requests)
        while True:
            may_begin = until is None or time.monotonic() < until
            has_room = bool(self._idle) or not self._players
            # Not taken before there is room: a request that is made counts as sent.
            request = next(left, None) if may_begin and has_room else None
            if request is not None:
                if self._players:
                    self._begin(request)
                else:
                    yield self.answer(request)
            elif self._under_way:
                yield self._finished()
            else:
                return

    def abandon(self) -> None:
        """Waits for all requests that are under way, and drops the answers."""
        while self._under_way:
            self._finished()

    def take_shipped(self) -> dict[str, int]:
        """Returns no bytes, since no file leaves this machine."""
        return {}

    def close(self) -> None:
        """Ends the threads, each after its request."""
        for player in self._players:
            player.requests.put(None)
        for player in self._players:
            player.join(_END_SECONDS)

    def _begin(self, request: Request) -> None:
        """Gives a request to an idle thread."""
        if self.stop.is_set():
            raise Interrupted
        # Parts are loaded while no client trains: both draw from the process's only random state. An error is raised
        # again where the request is answered.
        if not self._under_way:
            for service in self._services:
                outcome(functools.partial(service.visit, request))
        player = self._idle.pop()
        self._under_way[request.client] = player
        player.requests.put(request)

    def _finished(self) -> Answer:
        """Waits for the next answer."""
        names = " or ".join(f"client {client}" for client in self._under_way)
        with self._watchdog.doing(names):
            answer = self._answers.get()
        self._idle.append(self._under_way.pop(answer.client))
        return answer

    def answer(self, request: Request) -> Answer:
        """Answers a request in this thread."""
        if self.stop.is_set():
            raise Interrupted
        with self._watchdog.doing(f"client {request.client}"):
            return self._services[0].answer(request)


@dataclass(frozen=True)
class Heard:
    """A client's way to the trunk, on which every packet is a sign of life.

    Attributes:
        trunk: The trunk.
        beat: Notes a sign of life.
    """

    trunk: TrunkPort
    beat: Callable[[], None]

    def send(self, packet: Packet) -> PendingAnswer:
        """Sends a packet without waiting; the function that is returned waits for the answer."""
        self.beat()
        return self.trunk.send(packet)

    def leave(self, client: int) -> None:
        """Ends the round of a client."""
        self.trunk.leave(client)


class LocalSession:
    """The clients of a run in this process, with the trunk or with a way to the trunk's server.

    Attributes:
        trunk: The trunk.
        name: Name of the trunk and of the run.
        plan: Threads of clients and trunk.
        notes: No lines: everything is here.
    """

    def __init__(self, config: Config, plan: Plan, objects: Objects = NOTHING) -> None:
        """Loads the trunk.

        Args:
            config: Configuration of the run.
            plan: Threads of clients and trunk.
            objects: Strategy, objective and metrics that are objects.
        """
        self._config = config
        self.plan = plan
        self.notes: list[str] = []
        self._workers = plan.workers
        self._objects = objects
        self._place = place_of(config, self._load)
        self.name, self.trunk = self._place.begin()

    def _load(self, name: str) -> RunTrunk:
        """Loads all stages of all replicas of the trunk."""
        config = self._config
        stage = stage_maker(config, self._objects.strategy)
        replicas = load_trunks(config, name, new_incarnation(), stage=stage, callers=self._workers)
        return LocalTrunks(config, replicas)

    def renew(self) -> None:
        """Closes the trunk, and loads another one; or begins again at the trunk's server."""
        self.close()
        self.name, self.trunk = self._place.begin()

    def weigh(self) -> Config:
        """Divides the clients among replicas by speed, if the settings ask for it; see `Session.weigh`."""
        self._config = self.trunk.weigh(self._config)
        return self._config

    def close(self) -> None:
        """Closes all stages of all replicas of the trunk, or the connections to the trunk's server."""
        self.trunk.kill()

    def play(self, federation: Federation) -> None:
        """Runs a federation to its end.

        Raises:
            Hung: A client, or the strategy, gives no sign of life.
        """
        watchdog = federation.watchdog

        def connect(name: str, config: Config) -> Heard:
            return Heard(self.trunk, watchdog.beat)

        services = [ClientService(connect, self._objects) for _ in range(self._workers)]
        clients = LocalClients(services, federation.stop, watchdog)
        with watchdog.looking():
            try:
                federation.run(clients)
            except BaseException:
                self.close()  # clients in the middle of a step would wait for the trunk for ever
                raise
            finally:
                clients.close()


@contextlib.contextmanager
def running(config: Config, plan: Plan, objects: Objects = NOTHING) -> Iterator[LocalSession]:
    """Loads the trunk in this process, and restores torch's number of threads at the end.

    Args:
        config: Configuration of the run.
        plan: Threads of clients and trunk.
        objects: Strategy, objective and metrics that are objects.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(plan.trunk_threads)
    try:
        session = LocalSession(config, plan, objects)
        try:
            yield session
        finally:
            session.close()
    finally:
        torch.set_num_threads(threads)


def federate(config: Config, out: Path, strategy: Any, *sinks: Sink) -> Federation:
    """Runs a whole federation in this process, with one thread and unchanged settings.

    Args:
        config: Configuration of the run.
        out: Folder of the run.
        strategy: Strategy of ours or of Flower's.
        sinks: Sinks for the events, beside the files in the run's folder.

    Returns:
        The finished federation, with the summary.
    """
    started = time.perf_counter()
    facts = read_facts(config_folder(config.model))
    shards = shards_of(config)
    with running(config, Plan(1, 1, 1, 1, 1), Objects(strategy)) as session:
        content = content_of(shards, config_folder(config.model), weights_folder(config), code=code_of(config))
        folder = RunFolder(out, config, facts.family, facts.blocks, content)
        watchdog = Watchdog(config.timeout)
        emit = Emitter([MetricsFile(out), SummaryFile(out), *sinks], watchdog=watchdog)
        work = workloads(config, [shard.size for shard in shards])
        job = Job(config, strategy, work, folder, emit, started, watchdog)
        federation = Federation(job, session, threads=1)
        with emit, on_disks(folder.clients, shards):
            session.play(federation)
    return federation
