"""A trunk that is lost is followed by another one of another name."""

from __future__ import annotations

from typing import Any

import pytest

from fedsplit.engines import ray_host
from fedsplit.engines.planning import Plan
from fedsplit.engines.ray_host import RayHost
from fedsplit.settings.documents import build
from fedsplit.trunk.actor import ActorSetup


class Trunk:
    """Knows whether it was killed."""

    def __init__(self, name: str, setup: ActorSetup, options: Any) -> None:
        self.facts = (name, setup, options)
        self.killed = False

    def kill(self) -> None:
        self.killed = True


def test_the_old_trunk_ends_before_the_new_one_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    trunks: list[Trunk] = []

    def start(config: Any, *arguments: Any) -> Trunk:
        assert all(trunk.killed for trunk in trunks)
        trunks.append(Trunk(*arguments))
        return trunks[-1]

    monkeypatch.setattr(ray_host, "start_trunks", start)
    places = iter(([{"num_cpus": 1}], [{"num_cpus": 2}]))
    host = RayHost(build({"ray.address": "auto"}), Plan(2, 1, 3, 1, 2), has_stage=True, place=lambda: next(places))
    first = host.name
    host.renew()
    assert [trunk.killed for trunk in trunks] == [True, False]
    setup = ActorSetup(threads=3, workers=2, has_stage=True, is_reached_from_afar=True)
    expected = [(first, setup, [{"num_cpus": 1}]), (host.name, setup, [{"num_cpus": 2}])]
    assert [trunk.facts for trunk in trunks] == expected
    assert host.name != first
