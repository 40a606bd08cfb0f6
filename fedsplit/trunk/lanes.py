"""Threads of the trunk that compute beside each other: forwards in one, backwards in another."""

from __future__ import annotations

import os
import queue
import threading
import traceback
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch

FORWARD, BACKWARD = "forward", "backward"


class LanesLike(Protocol):
    """Whatever computes elsewhere, while who asked goes on."""

    def start(self, lane: str, compute: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """Has something computed; `done` takes what it made, or the exception that it raised."""
        ...


def outcome(compute: Callable[[], Any]) -> Any:
    """What a computation makes, or the exception that it raises."""
    try:
        return compute()
    except Exception as error:  # noqa: BLE001  # it is the caller's to know
        return error


class Lanes:
    """A thread for each lane, which computes what comes in, in that order."""

    def __init__(self, names: Iterable[str], threads: int, post: Callable[[Callable[[], None]], None]) -> None:
        """Starts the threads; they end with the process.

        Args:
            names: Of the lanes.
            threads: Torch's, in each.
            post: Hands a call to the thread that asked.
        """
        self._threads, self._post = threads, post
        self._queues: dict[str, queue.SimpleQueue[tuple[Callable[[], Any], Callable[[Any], None]]]] = {}
        for name in names:
            self._queues[name] = queue.SimpleQueue()
            threading.Thread(target=self._work, args=(name,), name=name, daemon=True).start()

    def _work(self, name: str) -> None:
        torch.set_num_threads(self._threads)  # OpenMP keeps the number for each thread that asks
        try:
            while True:
                self._next(*self._queues[name].get())
        finally:  # a defect: better a trunk that is seen to be gone than one whose answers never come
            traceback.print_exc()
            os._exit(1)

    def _next(self, compute: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """One computation; nothing of it is kept while the lane waits for another."""
        made = outcome(compute)
        self._post(lambda: done(made))

    def start(self, lane: str, compute: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """As `LanesLike.start`; `done` is posted."""
        self._queues[lane].put((compute, done))
