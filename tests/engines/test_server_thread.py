"""The server's loop in a thread: what ends it, and who may interrupt it."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from fedsplit.engines import server_thread
from fedsplit.engines.server_thread import run_in_thread
from fedsplit.watchdog import Hung, Watchdog


class Federation:
    """The part of a federation that the caller of its thread needs."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.watchdog = Watchdog(0.0)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_thread, "_END_SECONDS", 0.1)


def test_the_end_of_the_loop_ends_the_call() -> None:
    federation, killed = Federation(), threading.Event()
    run_in_thread(federation, lambda: None, killed.set)
    assert federation.stop.is_set() and not killed.is_set()


def test_what_ends_the_loop_ends_the_call() -> None:
    def broken() -> None:
        raise ValueError("no luck")

    federation = Federation()
    with pytest.raises(ValueError, match="no luck"):
        run_in_thread(federation, broken, lambda: None)
    assert federation.stop.is_set()


def test_an_interrupt_is_heard_while_the_loop_runs_and_kills_what_the_loop_waits_for() -> None:
    federation, killed = Federation(), threading.Event()

    def hangs() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(60)

    with pytest.raises(KeyboardInterrupt):
        run_in_thread(federation, hangs, killed.set)
    assert federation.stop.is_set() and killed.is_set()


def test_a_loop_that_hangs_ends_the_call() -> None:
    """As where a strategy never returns: the thread cannot be ended, and is not waited for."""
    federation, killed = Federation(), threading.Event()

    def hangs() -> None:
        with federation.watchdog.doing("the strategy"):
            threading.Event().wait(60)

    with pytest.raises(Hung, match=r"^the strategy has not returned"):
        run_in_thread(federation, hangs, killed.set)
    assert federation.stop.is_set() and killed.is_set()
