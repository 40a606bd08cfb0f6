"""A pool of Ray actors that play clients: work is pushed to them, and the dead are replaced."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from fedsplit.errors import first_line
from fedsplit.trunk.cluster import send_tensors_as_arrays

_LEAST_LIVES = 3
"""Processes of a worker that may die in a row before they have done anything, as where a library is missing."""


class WorkerLost(Exception):
    """The process that did a piece of work is gone."""


class NoWorkers(Exception):
    """The workers' processes die as they start."""


@dataclass(frozen=True)
class Work:
    """A piece of work for any worker.

    Attributes:
        arguments: Arguments of the player's `play`.
        done: Takes the result, or the error; called in a thread of the pool.
    """

    arguments: tuple[Any, ...]
    done: Callable[[Any], None]


@dataclass(frozen=True)
class Place:
    """The place of a worker's process.

    Attributes:
        node: Ray's id of the node.
        pid: Number of the process there.
    """

    node: str
    pid: int


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
        self._actor = start()
        self._place: Place | None = None
        self._failed_starts = 0
        self.is_busy = False

    def run(self) -> None:
        """Does work until the pool closes."""
        while (work := self._pool.take()) is not None:
            self.is_busy = True
            result = self._done(work)
            self.is_busy = False
            work.done(result)

    def _done(self, work: Work) -> Any:
        """Returns the result of a piece of work, or the error."""
        try:
            self._look()
            return ray.get(self._actor.play.remote(*work.arguments))
        except ray.exceptions.RayActorError as error:
            reason = self._reason(error)
        except ray.exceptions.RayError as error:
            return error
        if self._pool.is_closed:
            return WorkerLost(reason)
        if self._place is None:
            self._failed_starts += 1
            if self._failed_starts >= _LEAST_LIVES:
                return NoWorkers(f"a client's process ended as it started, {_LEAST_LIVES} times: {reason}")
        with self._guard:
            self._place = None
            self._actor = self._start_actor()
        return WorkerLost(reason)

    def _reason(self, error: Exception) -> str:
        """Returns why the actor is gone, in a line: of an error as it loaded, Ray tells the whole traceback."""
        lines = str(error).split("\n")
        return lines[-1] if self._place is None and len(lines) > 1 else first_line(error)

    def _look(self) -> None:
        """Waits until the actor has started."""
        if self._place is None:
            self._place = ray.get(self._actor.place.remote())
            self._failed_starts = 0

    def kill(self) -> None:
        """Kills the actor's process, and the work that it does."""
        with self._guard, contextlib.suppress(ray.exceptions.RayError):
            place = self._place
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

    def __init__(self, size: int, load: Callable[[], Callable[..., Any]], cpus: float = 1.0) -> None:
        """Starts the workers, which load while the caller goes on.

        Args:
            size: Number of workers.
            load: Returns, in a worker, the function that plays a client; it travels by its name.
            cpus: Number of CPUs that Ray keeps for a worker.
        """
        self.is_closed = False
        self._waiting: deque[Work] = deque()
        self._changed = threading.Condition()
        actor = ray.remote(num_cpus=cpus, max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD")(
            ClientWorker
        )
        self._workers = [_Worker(self, lambda: actor.remote(load)) for _ in range(size)]
        for worker in self._workers:
            worker.start()

    def submit(self, work: Work) -> None:
        """Takes a piece of work, which the next free worker does; work begins in the order of the calls."""
        with self._changed:
            self._waiting.append(work)
            self._changed.notify()

    def take(self) -> Work | None:
        """Waits for a piece of work; returns None when the pool closes."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self.is_closed)
            return None if self.is_closed else self._waiting.popleft()

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
