"""Flower's own engine: its errors, and the end of its run."""

from __future__ import annotations

import flwr.simulation
import pytest
from flwr.serverapp import ServerApp

from fedsplit.engines import flower_engine


def test_what_ends_the_engine_ends_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("no luck")

    monkeypatch.setattr(flwr.simulation, "run_simulation", broken)
    with pytest.raises(ValueError, match="no luck"):
        flower_engine.simulate(ServerApp(), 2)


def test_workers_that_die_are_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a dead one's slot would fail every client from then on."""
    asked = {}
    monkeypatch.setattr(flwr.simulation, "run_simulation", lambda *_, backend_config: asked.update(backend_config))
    flower_engine.simulate(ServerApp(), 2)
    assert asked["client_resources"]["max_restarts"] == -1
