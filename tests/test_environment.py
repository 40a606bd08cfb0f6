"""What libraries find in the environment."""

from __future__ import annotations

import os
import sys
import types
import warnings
from pathlib import Path

import pytest

from fedsplit import environment
from fedsplit.environment import (
    ENVIRONMENT,
    QUIET,
    check_closed,
    check_open,
    prefer_installed,
    prepare,
    private_files,
    quieten,
)
from fedsplit.errors import InputError


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment of the test's own, in which Ray was not imported yet."""
    monkeypatch.setattr(environment, "_ray_is_open", False)
    monkeypatch.setattr(environment, "_own_token", "")
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.delitem(sys.modules, "ray", raising=False)


def test_a_token_of_its_own_closes_every_runs_processes() -> None:
    prepare()
    first = os.environ["RAY_AUTH_TOKEN"]
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert len(bytes.fromhex(first)) == 32
    os.environ.clear()
    prepare()
    assert os.environ["RAY_AUTH_TOKEN"] != first


def test_ray_that_was_imported_without_a_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", types.ModuleType("ray"))
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="mine")
    prepare()
    check_closed()
    os.environ.clear()
    prepare()
    with pytest.raises(InputError, match="prepare"):
        check_closed()


def test_a_cluster_of_others_is_met_with_its_token_or_none() -> None:
    """With a token of our own, its servers could not call back, and every actor would end as it starts."""
    prepare("10.0.0.7:6379")
    assert "RAY_AUTH_TOKEN" not in os.environ and "RAY_AUTH_MODE" not in os.environ
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in os.environ  # would bind the driver to the loopback interface
    check_open()
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="the administrator's")
    prepare("auto")
    prepare()
    assert os.environ["RAY_AUTH_TOKEN"] == "the administrator's"
    check_open()


def test_a_process_that_has_started_a_private_ray_joins_no_other() -> None:
    prepare()
    with pytest.raises(InputError, match=r"^ray.address: .* use a new process$"):
        check_open()


@pytest.mark.parametrize("first", ["here", "", "."])
def test_the_working_folder_is_looked_in_last(first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    entry = str(tmp_path) if first == "here" else first
    monkeypatch.setattr(sys, "path", [entry, "/lib/one", "/lib/two"])
    prefer_installed()
    assert sys.path == ["/lib/one", "/lib/two", entry]


def test_the_folder_that_fedsplit_comes_from_keeps_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(Path(environment.__file__).parent.parent)
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "path", [root, "/lib/one"])
    prefer_installed()
    assert sys.path == [root, "/lib/one"]


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


@pytest.mark.parametrize(("umask", "inside"), [(0o022, 0o077), (0o000, 0o077), (0o277, 0o277)])
def test_files_are_the_users_alone_or_as_the_umask_if_stricter(umask: int, inside: int) -> None:
    before = os.umask(umask)
    try:
        with private_files():
            assert os.umask(inside) == inside
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
