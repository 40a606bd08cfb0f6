"""A pool of Ray actors that play clients. Work is pushed to the actors, and dead actors are replaced."""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import itertools
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedsplit.errors import first_line
from fedsplit.trunk.cluster import send_tensors_as_arrays

_MOST_FAILED_STARTS = 3
"""Processes of a worker that may die in a row before they have done anything, as where a library is missing."""

_GROW_SECONDS = 2.0
"""Time between two looks at whether the cluster has room for more workers."""

_END_SECONDS = 3.0
"""Time to wait for the threads of all workers at the end. They notice at once that their actors were killed."""

_CHOICE = 32
"""Pieces of work at the head of the queue among which a worker chooses."""


class WorkerLost(Exception):
    """The process that did a piece of work is gone."""


class NoWorkers(Exception):
    """The processes of the workers end during their start."""


@dataclass(frozen=True)
class Place:
    """The place of a worker's process.

    Attributes:
        node: Ray's id of the node.
        pid: Number of the process there.
        address: IP address of the node. A restart of Ray changes the id of the node, but not the address.
    """

    node: str
    pid: int
    address: str = ""


class Work(Protocol):
    """A piece of work for any worker. The methods are called in a thread of the pool."""

    @property
    def home(self) -> str:
        """Ray's id of the only node on which the work can be done; empty if it can be done anywhere."""
        ...

    @property
    def can_be_early(self) -> bool:
        """Returns True if the arguments may be made while the worker does the work before."""
        ...

    def suits(self, place: Place) -> bool:
        """Returns True if a place suits the work best, such as a node that has the client's files."""
        ...

    def arguments(self, place: Place) -> tuple[Any, ...]:
        """Returns the arguments for the player at a place."""
        ...

    def done(self, place: Place, result: Any) -> None:
        """Takes the result, or the error.

        Args:
            place: Place where the work was done, or begun.
            result: What the player returned; an exception if there is no result.
        """
        ...


class ClientWorker:
    """The class of the Ray actor: a process that plays clients in turn."""

    def __init__(self, load: Callable[[], Callable[..., Any]]) -> None:
        """Loads the player and all libraries, so that the first client does not wait.

        Args:
            load: Returns the function that plays a client.
        """
        send_tensors_as_arrays()
        self._play = load()

    def place(self) -> Place:
        """Returns the place of this process."""
        node = ray.get_runtime_context().get_node_id()
        return Place(node, os.getpid(), ray.util.get_node_ip_address())

    def play(self, *arguments: Any) -> Any:
        """Does a piece of work."""
        return self._play(*arguments)


@dataclass(frozen=True)
class _Call:
    """A call of an actor.

    Attributes:
        work: The work.
        actor: The actor.
        place: Place of the actor.
        reply: Ray's reference to the result; the error where the arguments could not be made.
    """

    work: Work
    actor: Any
    place: Place
    reply: Any

    @classmethod
    def of(cls, work: Work, actor: Any, place: Place) -> _Call:
        """Calls an actor."""
        try:
            return cls(work, actor, place, actor.play.remote(*work.arguments(place)))
        except Exception as error:  # noqa: BLE001  # of the work, and told to whoever gave it
            return cls(work, actor, place, error)

    def result(self) -> Any:
        """Waits for the result.

        Raises:
            Exception: An error of the work, or of Ray.
        """
        if isinstance(self.reply, Exception):
            raise self.reply
        return ray.get(self.reply)


class _Worker(threading.Thread):
    """Hands work to one actor, and starts another actor where the first one dies.

    A thread for each actor, since a free actor must not wait until the server has dealt with the last reply.
    """

    def __init__(self, pool: WorkerPool, start: Callable[[], Any], node: str) -> None:
        super().__init__(daemon=True, name="worker")
        self._pool = pool
        self._start_actor = start
        self.node = node
        self._guard = threading.Lock()  # this thread replaces the actor, and others kill it
        self._actor: Any = start()
        self._failed_starts = 0
        self._next: _Call | None = None
        self.place: Place | None = None
        self.is_busy = False

    def run(self) -> None:
        """Does work until the pool closes."""
        while self._next is not None or not self._pool.is_closed:
            if self._next is not None:
                self._do(self._next)
                continue
            # Work is taken by an actor that has its place: one that waits for room in the cluster holds up nobody.
            reason = self._settle()
            if reason and self._failed_starts < _MOST_FAILED_STARTS:
                self._replace()
                continue
            work = self._pool.take(self.place, self.node, lambda: self._actor is not None)
            if work is None:
                continue
            with self._guard:
                actor, place = self._actor, self.place
            if actor is not None and place is not None:
                self._do(_Call.of(work, actor, place))
            elif self._failed_starts:
                words = f"a client's process ended as it started, {_MOST_FAILED_STARTS} times: {reason}"
                work.done(Place("", 0), NoWorkers(words))
            else:
                work.done(Place("", 0), WorkerLost("the process was given up a moment ago"))

    def _settle(self) -> str:
        """Waits until the actor has a place. Returns the reason for a failure, or an empty text."""
        if self.place is not None:
            return ""
        actor = self._present()
        if actor is None:
            return ""
        try:
            place = ray.get(actor.place.remote())
        except ray.exceptions.RayError as error:
            if self._is_given_up(actor):
                return ""
            self._failed_starts += 1
            lines = str(error).split("\n")  # a whole traceback, of which the last line tells what is wrong
            return lines[-1] or first_line(error)
        with self._guard:
            if actor is self._actor:  # else it was given up in the meantime
                self.place = place
        self._failed_starts = 0
        self._pool.note_place()
        return ""

    def _present(self) -> Any:
        """Returns the actor, a new one if the last was given up. Waits while the pool keeps room; None once closed."""
        if self._actor is None and self._pool.wait_for_room():
            self._replace()
        return self._actor

    def _is_given_up(self, actor: Any) -> bool:
        with self._guard:
            return self._actor is not actor

    def _do(self, call: _Call) -> None:
        """Waits for the result of a call, and hands on the result or the error.

        The actor gets its next call before, so that it need not wait until this thread has dealt with the result.
        """
        self.is_busy = True
        early = self._pool.take_early(call.place, self.node)
        self._next = None if early is None else _Call.of(early, call.actor, call.place)
        result: Any
        try:
            result = call.result()
        except ray.exceptions.RayActorError as error:
            result = WorkerLost(first_line(error))
            if not self._is_given_up(call.actor):  # else `_present` starts another one when there is room
                self._replace()
            if early is not None:
                self._pool.put_back(early)  # not begun: an actor does its calls in order
            self._next = None
        except Exception as error:  # noqa: BLE001  # of the work, and told to whoever gave it
            result = error
        # Before `done`: the work has its result, and `kill_busy` must not kill the process for it. The process may be
        # at its next work already.
        self.is_busy = self._next is not None
        call.work.done(call.place, result)

    def _replace(self) -> None:
        """Replaces a dead actor. Does nothing after the end of the pool."""
        with self._guard:
            if not self._pool.is_closed:  # `close` kills once, and would miss a later actor
                self.place = None
                self._actor = self._start_actor()

    def give_up(self) -> None:
        """Kills the actor's process. The thread starts a new process once the pool allows it."""
        self.kill()
        with self._guard:
            self.place = None
            self._actor = None

    def kill(self) -> None:
        """Kills the actor's process, and so the running work."""
        with self._guard, contextlib.suppress(ray.exceptions.RayError):
            place = self.place
            if self._actor is not None:
                ray.kill(self._actor, no_restart=True)
        # A process that has been stopped does not hear Ray.
        if place is not None and place.node == ray.get_runtime_context().get_node_id():
            with contextlib.suppress(OSError):
                os.kill(place.pid, signal.SIGKILL)


def _strategy(node: str) -> Any:
    """Returns Ray's strategy for an actor that runs on a node or not at all; on any node if none is given."""
    return NodeAffinitySchedulingStrategy(node, soft=False) if node else "SPREAD"


def _by_number(address: str) -> tuple[int, str]:
    """Returns a key by which addresses are sorted: 10.0.0.9 comes before 10.0.0.10."""
    try:
        return int(ipaddress.ip_address(address)), address
    except ValueError:
        return 0, address


class WorkerPool:
    """Processes that play clients.

    Work is pushed: an idle worker gets the next work at once. A worker is a Ray actor. The pool restarts dead actors,
    and not Ray, since only the pool knows the lost work.

    Attributes:
        is_closed: True after the end of the pool.
    """

    def __init__(
        self,
        size: Callable[[], int],
        load: Callable[[], Callable[..., Any]],
        options: Mapping[str, Any],
        nodes: Sequence[str] = (),
    ) -> None:
        """Starts the workers, which load in the background.

        Args:
            size: Returns the number of workers with room. The pool asks repeatedly.
            load: Called in a worker, returns the function for playing a client. `load` is sent to the worker by name.
            options: Options of the Ray actor: resources of each worker, and the placement.
            nodes: Ray's id of the node of each worker; empty if Ray chooses the nodes.
        """
        self.is_closed = False
        self._size = size
        self._waiting: deque[Work] = deque()
        self._changed = threading.Condition()
        self._looked = 0.0
        self._keeps_room = False
        lasting = {"max_restarts": 0, "max_task_retries": 0, **options}
        actor = ray.remote(ClientWorker)
        self._start = lambda node: actor.options(**lasting, scheduling_strategy=_strategy(node)).remote(load)
        self._nodes = nodes
        self._workers: list[_Worker] = []
        self.grow()

    def grow(self) -> None:
        """Starts further workers if there is room, such as on a node new to the cluster."""
        # Without any worker, nothing would go on: looks every time.
        if time.monotonic() < self._looked + _GROW_SECONDS and self._workers:
            return
        self._looked = time.monotonic()
        for number in range(len(self._workers), self._size()):
            node = self._nodes[number] if self._nodes else ""
            self._workers.append(_Worker(self, functools.partial(self._start, node), node))
            self._workers[-1].start()

    def places(self) -> list[Place]:
        """Returns the places of the workers, node by node, as far as workers have a place.

        Nodes are sorted by address, so that the order is the same after a restart.
        """
        found = [worker.place for worker in self._workers if worker.place is not None]
        return sorted(found, key=lambda place: (_by_number(place.address), place.node, place.pid))

    def note_place(self) -> None:
        """Notes that a worker has a place. The worker calls the method."""
        with self._changed:
            self._changed.notify_all()

    def wait_for_places(self, count: int, seconds: float, nodes: Collection[str] = ()) -> int:
        """Waits until some workers have places, or a time has passed. Returns the number of workers with a place.

        Args:
            count: Number of workers.
            seconds: Longest wait.
            nodes: Nodes, each to have one of the workers.
        """

        def is_met() -> bool:
            places = self.places()
            return len(places) >= count and {*nodes} <= {place.node for place in places}

        with self._changed:
            self._changed.wait_for(is_met, seconds)
        return len(self.places())

    def submit(self, work: Work) -> None:
        """Queues a piece of work for the next free worker.

        Work begins in the order of the calls. A worker may prefer work that suits its place, among the next `_CHOICE`.
        """
        with self._changed:
            self._waiting.append(work)
            # All are woken: perhaps only one of them is on the node that the work needs.
            self._changed.notify_all()

    def take(
        self,
        place: Place | None,
        node: str,
        is_ready: Callable[[], bool],
    ) -> Work | None:
        """Waits for a piece of work. Returns None when the pool closes, or the worker has lost its actor.

        Args:
            place: Place of the worker; None for a worker with processes that end during their start.
            node: Ray's id of the node, if chosen by the run; empty if chosen by Ray.
            is_ready: Returns whether the worker still has an actor.
        """
        if place is None and node:
            # A worker whose node is lost takes the work of that node alone, which nobody else can do, and says why.
            here = {node}
        elif place is None:
            here = {""}
        else:
            here = {"", node or place.node}  # "": work without a home
        with self._changed:
            self._changed.wait_for(lambda: self.is_closed or not is_ready() or self._possible(here))
            if self.is_closed or not is_ready():
                return None
            choice = self._possible(here)
            best = choice[0]
            if place is not None:
                best = next((work for work in choice if work.suits(place)), choice[0])
            self._waiting.remove(best)
            return best

    def take_early(self, place: Place, node: str) -> Work | None:
        """Returns a piece of work for after the running work, or None.

        Work for each of the workers stays in the queue, so that none is idle while another has work for later. So the
        last pieces of work go to whoever is free first.

        Args:
            place: Place of the worker.
            node: Ray's id of the node, if chosen by the run; empty if chosen by Ray.
        """
        with self._changed:
            if self.is_closed or self._keeps_room or len(self._waiting) <= len(self._workers):
                return None
            fitting = (work for work in self._possible({"", node or place.node}) if work.can_be_early)
            early = next((work for work in fitting if work.suits(place)), None)
            if early is not None:
                self._waiting.remove(early)
            return early

    def put_back(self, work: Work) -> None:
        """Puts work that was not begun back to the head of the queue."""
        with self._changed:
            self._waiting.appendleft(work)
            self._changed.notify_all()

    def _possible(self, nodes: Collection[str]) -> list[Work]:
        """Returns the next pieces of work that can be done on some nodes."""
        possible = (work for work in self._waiting if work.home in nodes)
        return list(itertools.islice(possible, _CHOICE))

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Ends all workers to free their resources, and starts new workers at the end of the context."""
        with self._changed:
            # Before the actors are given up, so that no thread takes their room for another one.
            self._keeps_room = True
            for worker in self._workers:
                worker.give_up()
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._keeps_room = False
                self._changed.notify_all()

    def wait_for_room(self) -> bool:
        """Waits while room is kept for something else; returns False when the pool closes."""
        with self._changed:
            self._changed.wait_for(lambda: self.is_closed or not self._keeps_room)
            return not self.is_closed

    def kill_busy(self) -> None:
        """Kills the busy workers. New workers replace them."""
        for worker in self._workers:
            if worker.is_busy:
                worker.kill()

    def close(self) -> None:
        """Ends all workers, at once."""
        with self._changed:
            # Before the kills below, so that no thread replaces an actor that is killed.
            self.is_closed = True
            self._changed.notify_all()
        for worker in self._workers:
            worker.kill()

    def join(self) -> None:
        """Waits for the threads of a closed pool, but not for long. None should call Ray while Ray shuts down."""
        until = time.monotonic() + _END_SECONDS
        for worker in self._workers:
            worker.join(max(0.0, until - time.monotonic()))
