"""A pool of Ray actors that play clients: work is pushed to them, and the dead are replaced."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import ray

from fedsplit.errors import first_line
from fedsplit.trunk.cluster import send_tensors_as_arrays

_MOST_FAILED_STARTS = 3
"""Processes of a worker that may die in a row before they have done anything, as where a library is missing."""

_GROW_SECONDS = 2.0
"""Time between two looks at whether the cluster has room for more workers."""

_CHOICE = 32
"""Pieces of work at the head of the queue among which a worker chooses."""


class WorkerLost(Exception):
    """The process that did a piece of work is gone."""


class NoWorkers(Exception):
    """The workers' processes die as they start."""


@dataclass(frozen=True)
class Place:
    """The place of a worker's process.

    Attributes:
        node: Ray's id of the node.
        pid: Number of the process there.
    """

    node: str
    pid: int


class Work(Protocol):
    """A piece of work for any worker. The methods are called in a thread of the pool."""

    def suits(self, place: Place) -> bool:
        """Returns whether the work costs no more at this place than elsewhere, as where its files are there."""
        ...

    def arguments(self, place: Place) -> tuple[Any, ...]:
        """Returns the arguments of the player, who is at this place."""
        ...

    def done(self, place: Place, result: Any) -> None:
        """Takes the result, or the error.

        Args:
            place: Place where the work was done, or begun.
            result: What the player returned; an exception if there is no result.
        """
        ...


class ClientWorker:
    """A process that plays clients, one after the other; the class of the Ray actor."""

    def __init__(self, load: Callable[[], Callable[..., Any]]) -> None:
        """Loads the player, and with it all libraries: the first client does not wait for them.

        Args:
            load: Returns the function that plays a client.
        """
        send_tensors_as_arrays()
        self._play = load()

    def place(self) -> Place:
        """Returns the place of this process."""
        return Place(ray.get_runtime_context().get_node_id(), os.getpid())

    def play(self, *arguments: Any) -> Any:
        """Does a piece of work."""
        return self._play(*arguments)


class _Worker(threading.Thread):
    """Hands work to one actor, and starts another actor where the first one dies.

    A thread for each actor, since a free actor must not wait until the server has dealt with the last reply.
    """

    def __init__(self, pool: WorkerPool, start: Callable[[], Any]) -> None:
        super().__init__(daemon=True, name="worker")
        self._pool = pool
        self._start_actor = start
        self._guard = threading.Lock()
        self._actor: Any = start()
        self._failed_starts = 0
        self.place: Place | None = None
        self.is_busy = False

    def run(self) -> None:
        """Does work until the pool closes."""
        while not self._pool.is_closed:
            # Work is taken by an actor that has its place: one that waits for room in the cluster holds up nobody.
            reason = self._settle()
            if reason and self._failed_starts < _MOST_FAILED_STARTS:
                self._replace()
                continue
            work = self._pool.take(self.place, lambda: self._actor is not None)
            if work is None:
                continue
            with self._guard:
                actor, place = self._actor, self.place
            if actor is not None and place is not None:
                self._do(work, actor, place)
            elif self._failed_starts:
                words = f"a client's process ended as it started, {_MOST_FAILED_STARTS} times: {reason}"
                work.done(Place("", 0), NoWorkers(words))
            else:
                work.done(Place("", 0), WorkerLost("the process was given up a moment ago"))

    def _settle(self) -> str:
        """Waits until the actor has its place; returns why it has none, or an empty text."""
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
            if actor is self._actor:
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

    def _do(self, work: Work, actor: Any, place: Place) -> None:
        """Does a piece of work, and hands on the result or the error."""
        self.is_busy = True
        try:
            result = ray.get(actor.play.remote(*work.arguments(place)))
        except ray.exceptions.RayActorError as error:
            result = WorkerLost(first_line(error))
            if not self._is_given_up(actor):
                self._replace()
        except Exception as error:  # noqa: BLE001  # of the work, and told to whoever gave it
            result = error
        self.is_busy = False
        work.done(place, result)

    def _replace(self) -> None:
        """Starts another actor in place of one that is dead. Does nothing once the pool is closed."""
        with self._guard:
            if not self._pool.is_closed:
                self.place = None
                self._actor = self._start_actor()

    def give_up(self) -> None:
        """Kills the actor's process. The thread starts another one as soon as the pool lets it."""
        self.kill()
        with self._guard:
            self.place = None
            self._actor = None

    def kill(self) -> None:
        """Kills the actor's process, and the work that it does."""
        with self._guard, contextlib.suppress(ray.exceptions.RayError):
            place = self.place
            if self._actor is not None:
                ray.kill(self._actor, no_restart=True)
        # A process that has been stopped does not hear Ray.
        if place is not None and place.node == ray.get_runtime_context().get_node_id():
            with contextlib.suppress(OSError):
                os.kill(place.pid, signal.SIGKILL)


class WorkerPool:
    """Processes that play clients.

    Work is pushed: a worker that has ended its work is given the next at once. A worker is a Ray actor of our own. Ray
    does not restart the actor: only the pool knows what the dead one was doing.

    Attributes:
        is_closed: True from the end on.
    """

    def __init__(
        self,
        size: Callable[[], int],
        load: Callable[[], Callable[..., Any]],
        options: Mapping[str, Any],
    ) -> None:
        """Starts the workers, which load while the caller goes on.

        Args:
            size: Returns the number of workers for which there is room; asked again now and then.
            load: Returns, in a worker, the function that plays a client; it travels by its name.
            options: Options of the Ray actor: the resources that Ray keeps for each worker, and the place.
        """
        self.is_closed = False
        self._size = size
        self._waiting: deque[Work] = deque()
        self._changed = threading.Condition()
        self._looked = 0.0
        self._keeps_room = False
        spread = {"max_restarts": 0, "max_task_retries": 0, "scheduling_strategy": "SPREAD", **options}
        actor = ray.remote(ClientWorker).options(**spread)
        self._start = lambda: actor.remote(load)
        self._workers: list[_Worker] = []
        self.grow()

    def grow(self) -> None:
        """Starts further workers where there is room for more, as on a node that has joined the cluster."""
        if time.monotonic() < self._looked + _GROW_SECONDS and self._workers:
            return
        self._looked = time.monotonic()
        for _ in range(self._size() - len(self._workers)):
            self._workers.append(_Worker(self, self._start))
            self._workers[-1].start()

    def places(self) -> list[Place]:
        """Returns the places of the workers that have one."""
        return [worker.place for worker in self._workers if worker.place is not None]

    def note_place(self) -> None:
        """Takes note that a worker has its place; called by the worker."""
        with self._changed:
            self._changed.notify_all()

    def wait_for_places(self, count: int, seconds: float) -> int:
        """Waits until some workers have their places, or a time has passed; returns how many have."""
        with self._changed:
            self._changed.wait_for(lambda: len(self.places()) >= count, seconds)
        return len(self.places())

    def submit(self, work: Work) -> None:
        """Takes a piece of work, which the next free worker does.

        Work begins in the order of the calls. A worker may prefer work that suits its place, among the next `_CHOICE`.
        """
        with self._changed:
            self._waiting.append(work)
            self._changed.notify_all()

    def take(self, place: Place | None, is_ready: Callable[[], bool]) -> Work | None:
        """Waits for a piece of work; returns None when the pool closes, or when the worker is ready no more.

        Args:
            place: Place of the worker; None for one whose processes die as they start.
            is_ready: Returns whether the worker still has an actor.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self.is_closed or not is_ready())
            if self.is_closed or not is_ready():
                return None
            choice = itertools.islice(self._waiting, _CHOICE)
            best = next((work for work in choice if place is not None and work.suits(place)), self._waiting[0])
            self._waiting.remove(best)
            return best

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Ends all workers, and starts them again at the end of the context: something else needs their room first."""
        with self._changed:
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
        """Kills the workers that are at work; others take their places."""
        for worker in self._workers:
            if worker.is_busy:
                worker.kill()

    def close(self) -> None:
        """Ends all workers, at once."""
        with self._changed:
            self.is_closed = True
            self._changed.notify_all()
        for worker in self._workers:
            worker.kill()
