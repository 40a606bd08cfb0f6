"""What libraries find in the environment."""

from __future__ import annotations

import os
import warnings

import pytest

from fedsplit.environment import ENVIRONMENT, QUIET, prepare, quieten


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment of the test's own."""
    monkeypatch.setattr(os, "environ", {})


def test_a_token_of_its_own_closes_every_runs_processes() -> None:
    prepare()
    first = os.environ["RAY_AUTH_TOKEN"]
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert len(bytes.fromhex(first)) == 32
    os.environ.clear()
    prepare()
    assert os.environ["RAY_AUTH_TOKEN"] != first


def test_no_telemetry_and_no_open_port() -> None:
    prepare()
    assert os.environ.items() >= ENVIRONMENT.items()
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"


def test_what_a_user_has_set_stays() -> None:
    os.environ.update(OMP_WAIT_POLICY="active", RAY_AUTH_TOKEN="mine")
    prepare()
    assert (os.environ["OMP_WAIT_POLICY"], os.environ["RAY_AUTH_TOKEN"]) == ("active", "mine")


@pytest.mark.parametrize("offline", [True, False])
def test_the_hub_is_asked_only_where_that_may_be(offline: bool) -> None:
    with warnings.catch_warnings(record=True) as heard:
        quieten(offline)
        warnings.warn("a library's", stacklevel=1)
    assert heard == []
    assert os.environ.items() >= QUIET.items()
    assert ("HF_HUB_OFFLINE" in os.environ) == offline
