"""Runs a federation in Flower's simulation engine, and can stop it at any time."""

from __future__ import annotations

import logging
import threading
from typing import Any, Protocol

from flwr.serverapp import ServerApp

from fedsplit.shutdown import kill_descendants

_BUSY_WORKER = "ray::ClientAppActor.run"
"""Beginning of the command line of a process that plays a client now, as Ray names it."""

_LOOK_SECONDS = 0.2
"""Time between two looks at whether the engine has ended; in between, signals are heard."""

_END_SECONDS = 5.0


def kill_busy_workers() -> None:
    """Kills processes that play a client now; Ray starts others, and Flower reports their clients as failed."""
    kill_descendants(_BUSY_WORKER)


class Runnable(Protocol):
    """What the engine needs of a federation.

    Attributes:
        stop: Ends the server's loop at its next look.
    """

    stop: threading.Event

    def app(self) -> ServerApp:
        """The ServerApp that runs the federation."""
        ...


class _Engine(threading.Thread):
    """Flower's engine in a thread of its own: its pool of threads would hold the main thread up for ever."""

    def __init__(self, federation: Runnable, clients: int) -> None:
        super().__init__(daemon=True, name="flower")
        self._federation, self._clients = federation, clients
        self.error: BaseException | None = None

    def run(self) -> None:
        # Deprecated without a public replacement: `flwr run` ends in the same engine.
        from flwr.simulation import run_simulation

        logging.getLogger("flwr").setLevel(logging.CRITICAL + 1)  # not before the import, which sets it anew

        from fedsplit.federation.client_app import app

        # A worker that dies is started again; otherwise its slot fails every client it is given from then on.
        resources: dict[str, Any] = {"num_cpus": 1, "num_gpus": 0.0, "max_restarts": 3}
        server = self._federation.app()
        try:
            run_simulation(server, app, self._clients, backend_config={"client_resources": resources})
        except BaseException as error:  # noqa: BLE001  # the main thread raises it
            self.error = error


def simulate(federation: Runnable, clients: int) -> None:
    """Runs the apps in Flower's engine, on the Ray that is running already.

    Args:
        federation: The federation; its `stop` is set at the end.
        clients: Number of clients.

    Raises:
        Exception: Whatever ended the server's loop.
        KeyboardInterrupt: The caller was interrupted; no client works any more then.
    """
    engine = _Engine(federation, clients)
    try:
        engine.start()
        while engine.is_alive():
            engine.join(_LOOK_SECONDS)
    except BaseException:
        federation.stop.set()
        # Flower waits for its clients, and the server may wait for the trunk: neither would ever look at `stop`.
        kill_descendants("ray::")
        engine.join(_END_SECONDS)
        raise
    federation.stop.set()
    if engine.error is not None:
        raise engine.error
