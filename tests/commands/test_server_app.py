"""The ServerApp: settings from the run configuration, and the end that Flower takes note of."""

from __future__ import annotations

from typing import Any

import pytest
from flwr.app import Context, RecordDict

from fedsplit.commands import server_app
from fedsplit.commands.server_app import config_of
from fedsplit.engines import flower_runtime
from fedsplit.errors import InputError, SettingError
from fedsplit.federation.clients import FederationFailed
from fedsplit.settings.config import Config
from fedsplit.watchdog import Hung


class Grid:
    """A grid with three nodes."""

    def get_node_ids(self) -> list[int]:
        return [70, 50, 60]


def play(run_config: dict[str, Any]) -> None:
    server_app.app(Grid(), Context(1, 1, {}, RecordDict(), run_config))


@pytest.fixture(autouse=True)
def ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower_runtime, "wait_for_ray", lambda: None)


def test_a_run_has_the_settings_of_the_run_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Config] = []

    def run(config: Config, opens: Any) -> dict[str, Any]:
        ran.append(config)
        return {"complete": True}

    monkeypatch.setattr(server_app, "run", run)
    play({"num-server-rounds": 2, "lora.rank": "4", "clients": 0})
    assert [(config.engine, config.clients, config.rounds, config.lora.rank) for config in ran] == [
        ("flower", 3, 2, (4,))
    ]


def test_clients_at_sites_need_no_ray_and_the_server_no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """More sites may connect than are there as the run begins."""
    ran: list[tuple[Config, int]] = []

    def run(config: Config, opens: Any, read: Any) -> dict[str, Any]:
        ran.append((config, len(read(config).shards)))
        return {"complete": True}

    monkeypatch.setattr(server_app, "run", run)
    monkeypatch.setattr(flower_runtime, "wait_for_ray", pytest.fail)
    play({"clients": 5, "flags": "--data.at site --data.format text --trunk.server 127.0.0.1:1"})
    ((config, shards),) = ran
    assert (config.clients, config.data.at, config.trunk.server, shards) == (5, "site", "127.0.0.1:1", 0)


def test_a_run_that_ended_early_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_app, "run", lambda *_, **__: {"complete": False, "ended": "no clients left"})
    with pytest.raises(FederationFailed, match="the run ended early: no clients left"):
        play({})


def test_code_that_hangs_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower takes a run for completed after an error that is no `Exception`."""

    def hangs(*_: object, **__: object) -> None:
        raise Hung("a sink has not returned for 3 seconds")

    monkeypatch.setattr(server_app, "run", hangs)
    with pytest.raises(FederationFailed, match="a sink has not returned for 3 seconds"):
        play({})


def test_errors_of_the_run_configuration_get_the_lines_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError):
        play({"num-server-rounds": 0, "learning-rate": -1})
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" is not possible")[0] for line in lines] == [
        "fedsplit: rounds: 0",
        "fedsplit: train.lr: -1",
    ]


@pytest.mark.parametrize(
    ("run_config", "words"),
    [
        ({"clients": 5}, "clients: 5 is not possible; allowed: 3, the number of SuperNodes, or 0; flwr run .* =5"),
        ({"engine": "local"}, "engine: local is not possible; allowed: flower under flwr run"),
        ({"flags": "--ray.address auto"}, "ray.address: auto is not possible; allowed: local under flwr run"),
        ({"out": "here"}, "out: here is not possible; allowed: an absolute path under flwr run"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_only_another_command_can_do_is_refused(run_config: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words.replace(" =5", "=5")):
        config_of(run_config, nodes=3)
