"""The engine of `flwr run`: a trunk in the Ray of Flower's runtime, and clients behind its grid."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import pytest

from fedsplit import environment
from fedsplit.engines import flower_engine, flower_runtime, ray_host
from fedsplit.engines.planning import Plan
from fedsplit.errors import InputError
from fedsplit.federation.clients import Clients
from fedsplit.settings.documents import build
from fedsplit.trunk import cluster
from fedsplit.watchdog import Watchdog


@dataclass
class Trunk:
    """Remembers that it was killed."""

    is_killed: bool = False

    def kill(self) -> None:
        self.is_killed = True


@dataclass
class Federation:
    """Remembers its clients."""

    stop: threading.Event = field(default_factory=threading.Event)
    watchdog: Watchdog = field(default_factory=lambda: Watchdog(60.0))
    clients: list[Clients] = field(default_factory=list)
    error: Exception | None = None

    def run(self, clients: Clients) -> None:
        self.clients.append(clients)
        if self.error is not None:
            raise self.error


@pytest.fixture
def trunk(monkeypatch: pytest.MonkeyPatch) -> Trunk:
    """A trunk in a Ray that runs already."""
    trunk = Trunk()
    monkeypatch.setattr(ray_host, "start_trunks", lambda *_: trunk)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(cluster.ray, "get_runtime_context", lambda: type("Context", (), {"gcs_address": "here"}))
    monkeypatch.setattr(cluster, "send_tensors_as_arrays", lambda: None)
    return trunk


def play(federation: Federation, grid: Any) -> None:
    with flower_runtime.opens(grid)(build({"clients": 2}), Plan(2, 1, 1, 1, 1), flower_engine.NOTHING) as session:
        session.play(federation)


def test_a_federation_plays_behind_the_grid_and_the_trunk_ends_with_it(trunk: Trunk) -> None:
    federation, grid = Federation(), object()
    play(federation, grid)
    assert [clients.grid for clients in federation.clients] == [grid]
    assert trunk.is_killed and federation.stop.is_set()


def test_what_ends_the_federation_ends_the_call(trunk: Trunk) -> None:
    with pytest.raises(ValueError, match="no luck"):
        play(Federation(error=ValueError("no luck")), object())
    assert trunk.is_killed


def test_a_ray_that_is_open_to_others_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_ray_is_open", True)
    with pytest.raises(InputError, match="ray was imported before fedsplit could close it"):
        flower_runtime.wait_for_ray()


def test_a_runtime_without_a_ray_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_ray_is_open", False)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    with pytest.raises(cluster.ClusterFailed, match="started without a Ray"):
        flower_runtime.wait_for_ray()
