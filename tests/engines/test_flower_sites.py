"""The engine of sites: it owns neither the trunk's server nor the clients, and ends none of them."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from fedsplit.engines import flower_sites
from fedsplit.engines.flower_clients import FlowerClients
from fedsplit.engines.planning import Plan
from fedsplit.settings.documents import build

CONFIG = build({"data.at": "site", "engine": "flower", "clients": 3, "trunk.server": "127.0.0.1:50052"})
PLAN = Plan(workers=1, client_threads=1, trunk_threads=1, micro_batches=1, trunk_lanes=1)


class Trunk:
    """A trunk at a server."""

    def __init__(self) -> None:
        self.connections = 1

    def kill(self) -> None:
        self.connections = 0


class Place:
    """A server that begins runs."""

    def __init__(self, config: Any) -> None:
        self.begun: list[Trunk] = []

    def begin(self) -> tuple[str, Trunk]:
        self.begun.append(Trunk())
        return f"run {len(self.begun)}", self.begun[-1]


class Federation:
    """A federation that remembers its clients, or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.stop = threading.Event()
        self.watchdog = self
        self.error = error
        self.clients: Any = None

    def check(self) -> None: ...

    def run(self, clients: Any) -> None:
        self.clients = clients
        if self.error:
            raise self.error


@pytest.fixture(autouse=True)
def _a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower_sites, "ServerPlace", Place)


def test_a_session_begins_at_the_server_and_hangs_up_at_its_end() -> None:
    with flower_sites.opens(grid=object())(CONFIG, PLAN) as session:  # type: ignore[arg-type]
        assert session.name == "run 1" and session.weigh() == CONFIG
        assert session.notes == ["trunk at 127.0.0.1:50052; each client at a site of its own"]
        first: Any = session.trunk
        session.renew()
        assert session.name == "run 2" and first.connections == 0
        second: Any = session.trunk
        assert second.connections == 1
    assert second.connections == 0


def test_a_federation_plays_with_the_clients_behind_the_grid() -> None:
    grid: Any = object()
    session = flower_sites.SitesSession(CONFIG, PLAN, grid)
    federation: Any = Federation()
    session.play(federation)
    assert isinstance(federation.clients, FlowerClients) and federation.clients.grid is grid
    with pytest.raises(ValueError, match="a broken run"):
        session.play(Federation(ValueError("a broken run")))  # type: ignore[arg-type]
