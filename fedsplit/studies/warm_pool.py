"""Warm worker processes: each imports the libraries once, and then plays one run after the other."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess, parent_process
from pathlib import Path
from typing import Any

END_SECONDS = 4.0
"""Time that a worker has to end its run in order after a signal, before it is killed. Below `GRACE_SECONDS`."""


@dataclass(frozen=True)
class Job:
    """One run for a worker.

    Attributes:
        name: Name of the run.
        task: What the worker's function gets, such as the settings of the run.
        log: File for everything that the run prints.
    """

    name: str
    task: Any
    log: Path


@dataclass(frozen=True)
class Outcome:
    """End of a run.

    Attributes:
        name: Name of the run.
        value: What the worker's function returned; None for a run that failed.
        error: Reason of a failure in one line; empty for none.
    """

    name: str
    value: Any = None
    error: str = ""


Work = Callable[[Any], Any]
"""Plays a run. A function of a module, since the worker imports it by its name."""

Describe = Callable[[BaseException], str]
"""Returns an error in one line. A function of a module."""


@dataclass
class _Worker:
    """A worker process, with the run that it plays."""

    process: BaseProcess
    connection: Connection
    job: Job | None = None


@dataclass
class Workers:
    """A pool of warm processes.

    A run that ends its process, such as one that is killed for its memory, fails alone: another process takes over.
    A context manager: leaving it ends all processes, in order where they react to SIGTERM.

    Attributes:
        work: Plays a run.
        warm: Imports what runs need; called once in each process.
        describe: Returns an error of a run in one line.
        most: Largest number of processes.
        may_grow: Returns True if there is memory for one more process, beside those that work.
    """

    work: Work
    warm: Callable[[], object]
    describe: Describe
    most: int
    may_grow: Callable[[], bool] = lambda: True
    _workers: list[_Worker] = field(default_factory=list)

    def start_first(self) -> None:
        """Starts one process ahead of the first run, if none is there, so that its imports go on beside other work."""
        if not self._workers:
            self._start()

    def _start(self) -> None:
        """Starts a process."""
        # Not by fork: torch's threads do not survive one.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        arguments = (theirs, self.work, self.warm, self.describe)
        # A daemonic process may have no children. `_end_with_parent` ends the workers in its place.
        process = context.Process(target=_serve, args=arguments, name="worker", daemon=False)
        process.start()
        # With this end open here, too, the pool would not see when the worker dies.
        theirs.close()
        self._workers.append(_Worker(process, ours))

    def play(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
        """Plays runs, and yields their outcomes as they end."""
        waiting = deque(jobs)
        while True:
            self._hand_out(waiting)
            busy = {worker.connection: worker for worker in self._workers if worker.job is not None}
            if not busy:
                return
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]  # `wait` returns what it was given
                yield self._outcome_of(worker)

    def _hand_out(self, waiting: deque[Job]) -> None:
        """Gives runs to idle processes, and starts further processes for the rest where there is room."""
        while waiting:
            idle = next((worker for worker in self._workers if worker.job is None), None)
            if idle is None:
                # The first process needs no leave: without it, nothing would ever be played.
                if len(self._workers) >= self.most or (self._workers and not self.may_grow()):
                    return
                self._start()
                continue
            idle.job = waiting.popleft()
            with contextlib.suppress(OSError):  # a process that has died meanwhile; its end is read as the outcome
                idle.connection.send(idle.job)

    def _outcome_of(self, worker: _Worker) -> Outcome:
        """Receives the outcome of a worker's run. A worker that has died is removed."""
        assert worker.job is not None
        name = worker.job.name
        try:
            outcome: Outcome = worker.connection.recv()
        except (EOFError, OSError):
            # For the exit code, which is known once the process has ended.
            worker.process.join(END_SECONDS)
            self._workers.remove(worker)
            return Outcome(name, error=_death(worker.process.exitcode))
        worker.job = None
        return outcome

    def close(self) -> None:
        """Ends all processes: idle ones at once, those at work by SIGTERM, and by force those that stay."""
        for worker in self._workers:
            worker.connection.close()
            if worker.job is not None:
                worker.process.terminate()
        # All have their signal before the first is waited for, so that they end at the same time.
        for worker in self._workers:
            worker.process.join(END_SECONDS)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join(END_SECONDS)
        self._workers.clear()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _death(exit_code: int | None) -> str:
    """Returns why a run's process has ended, in words."""
    if exit_code == -signal.SIGKILL:
        return "its process was killed, as the system does when memory runs out; --jobs 1 needs the least"
    if exit_code is not None and exit_code < 0:
        return f"its process was ended by {signal.Signals(-exit_code).name}"
    return f"its process ended with exit code {exit_code}"


def _serve(
    connection: Connection,
    work: Work,
    warm: Callable[[], object],
    describe: Describe,
) -> None:
    """Plays runs until the pool closes its end of the connection; what a worker process does."""
    # Ctrl-C reaches all processes of a terminal. The pool alone decides what becomes of the workers.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # What libraries print before the first run would go to the screen of the sweep.
    with open(os.devnull, "wb") as nothing:
        _write_to(nothing.fileno())
    warm()
    while True:
        try:
            job: Job = connection.recv()
        except (EOFError, OSError):
            return
        # Appended, since a run that goes on has a log already.
        with open(job.log, "ab", buffering=0) as log:
            _write_to(log.fileno())
            try:
                outcome, is_lost = _play(job, work, describe)
            except KeyboardInterrupt:  # the run has ended in order, and its pool is gone or about to be
                os._exit(128 + signal.SIGTERM)
        with contextlib.suppress(OSError):
            connection.send(outcome)
        if is_lost:
            os._exit(1)  # not by return: Python would wait for a thread that hangs


def _play(job: Job, work: Work, describe: Describe) -> tuple[Outcome, bool]:
    """Plays a run.

    Returns:
        The outcome, and True if the process is of no use any more.
    """
    try:
        return Outcome(job.name, work(job.task)), False
    except KeyboardInterrupt:  # SIGTERM of the pool, as `stoppable` raises it
        raise
    except Exception as error:  # noqa: BLE001  # whatever a run raises is no reason to lose the others
        return Outcome(job.name, error=describe(error)), False
    except BaseException as error:  # noqa: BLE001  # such as `Hung`, which leaves a thread that cannot be ended
        return Outcome(job.name, error=describe(error)), True


def _write_to(descriptor: int) -> None:
    """Sends the output of this process, that of native libraries included, to a file."""
    for stream in (1, 2):
        os.dup2(descriptor, stream)


def _end_with_parent() -> None:
    """Waits for the end of the pool's process, and ends this one as SIGTERM does: no run goes on by itself."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
