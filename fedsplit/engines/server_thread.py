"""Runs the server's loop in a thread, watched by the caller."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from fedsplit.watchdog import Watchdog

_LOOK_SECONDS = 0.2
"""Time between two looks at whether the thread hangs; in between, signals are heard."""

_END_SECONDS = 5.0
"""Time that the thread has to end after an interrupt."""


class Stoppable(Protocol):
    """Facts about a federation for the caller of the server's thread.

    Attributes:
        stop: Ends the server's loop at its next look.
        watchdog: Tells whether the server's thread hangs.
    """

    stop: threading.Event
    watchdog: Watchdog


class _Server(threading.Thread):
    """The server's thread; it does not keep the process from ending, since code of the user's may hang in it."""

    def __init__(self, loop: Callable[[], object]) -> None:
        super().__init__(daemon=True, name="server")
        self._loop = loop
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._loop()
        except BaseException as error:  # noqa: BLE001  # the caller's thread raises it
            self.error = error


def run_in_thread(
    federation: Stoppable,
    loop: Callable[[], object],
    kill: Callable[[], object],
) -> None:
    """Runs the loop of a federation to its end.

    The loop is in a second thread. Python raises signals in the main thread alone, and a wait of the loop in a library
    or in the user's code could not be ended from inside.

    Args:
        federation: The federation. Its `stop` is set at the end.
        loop: The server's loop.
        kill: Kills all processes of clients and trunk; called if the caller is interrupted.

    Raises:
        Exception: Whatever ended the loop.
        Hung: The user's code does not return. All clients have been killed.
        KeyboardInterrupt: The caller was interrupted. All clients have been killed.
    """
    server = _Server(loop)
    try:
        server.start()
        while server.is_alive():
            server.join(_LOOK_SECONDS)
            federation.watchdog.check()
    except BaseException:
        federation.stop.set()
        kill()  # the loop may wait for clients or for the trunk, and would never look at `stop`
        server.join(_END_SECONDS)
        raise
    federation.stop.set()
    if server.error is not None:
        raise server.error
