"""A trunk that is lost is followed by another one of another name."""

from __future__ import annotations

from typing import Any

import pytest

from fedsplit.engines import ray_host
from fedsplit.engines.planning import Plan
from fedsplit.engines.ray_host import RayHost
from fedsplit.settings.documents import build


class Trunk:
    """Knows whether it was killed."""

    def __init__(self, name: str, *threads: int, has_stage: bool) -> None:
        self.facts = (name, threads, has_stage)
        self.killed = False

    def kill(self) -> None:
        self.killed = True


def test_the_old_trunk_ends_before_the_new_one_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    trunks: list[Trunk] = []

    def start(config: Any, *arguments: Any, **options: Any) -> Trunk:
        assert all(trunk.killed for trunk in trunks)
        trunks.append(Trunk(*arguments, **options))
        return trunks[-1]

    monkeypatch.setattr(ray_host, "start_trunk", start)
    host = RayHost(build({}), Plan(2, 1, 3, 1, 2), has_stage=True)
    first = host.name
    host.renew()
    assert [trunk.killed for trunk in trunks] == [True, False]
    assert [trunk.facts for trunk in trunks] == [(first, (3, 2), True), (host.name, (3, 2), True)]
    assert host.name != first
