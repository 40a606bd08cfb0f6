"""The Flower App: ServerApp and ClientApp, as `[tool.flwr.app.components]` names them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedsplit.environment import prepare


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


def _client_app() -> ClientApp:
    from fedsplit.engines.client_app import app

    return app


def _server_app() -> ServerApp:
    from fedsplit.commands.server_app import app

    return app


_close()  # before the imports of the apps, which import Ray

client_app = _client_app()
"""Plays the client of a SuperNode."""

server_app = _server_app()
"""Plays the server's side of a run, with the settings of the run configuration."""
