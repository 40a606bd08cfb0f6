"""The Flower App: ServerApp and ClientApp, as `[tool.flwr.app.components]` names them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedsplit.environment import prepare

__all__ = ["client_app", "server_app"]  # Flower looks here for the names in pyproject.toml

client_app: ClientApp
"""Plays the client of a SuperNode."""

server_app: ServerApp
"""Plays the server's side of a run, with the settings of the run configuration."""


def _close() -> None:
    """Closes the Ray that Flower's simulation is about to start: loopback, a token, and a folder of this user alone.

    Flower imports Ray after both apps, so that the variables come in time.
    """
    prepare()
    if Path(sys.argv[0]).name != "flwr-simulation":
        return
    os.environ["RAY_ADDRESS"] = "local"  # Flower's `ray.init()` would join any Ray that it finds on the machine

    from fedsplit.trunk.cluster import keep_session_folder

    keep_session_folder()


_close()  # before the imports of the apps, which import Ray


def __getattr__(name: str) -> object:
    """Returns an app, which is imported as it is asked for: a site imports neither the server's side nor Ray."""
    if name == "client_app":
        from fedsplit.engines import client_app

        return client_app.app
    if name == "server_app":
        from fedsplit.commands import server_app

        return server_app.app
    raise AttributeError(f"module {__name__} has no attribute {name}")
