"""The name of an engine decides which one is opened."""

from __future__ import annotations

import pytest

from fedsplit.engines import flower_engine, in_process, ray_engine
from fedsplit.engines.session import engine_named
from fedsplit.errors import SettingError
from fedsplit.settings.choices import ENGINES
from fedsplit.settings.documents import build


def test_every_engine_that_may_be_asked_for_is_there() -> None:
    engines = {"ray": ray_engine.running, "local": in_process.running, "flower": flower_engine.running}
    assert {name: engine_named(name) for name in ENGINES} == engines


def test_another_engine_is_refused_by_name() -> None:
    with pytest.raises(SettingError, match=r"^engine: '?spark'? is not possible; allowed: "):
        build({"engine": "spark"})
