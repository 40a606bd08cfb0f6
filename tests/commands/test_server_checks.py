"""Settings that do not go with a trunk in a process of its own."""

from __future__ import annotations

import pytest

from fedsplit.commands.server_checks import check_remote, check_served
from fedsplit.errors import SettingError
from fedsplit.settings.documents import build

SERVER = {"trunk.server": "127.0.0.1:50052"}

ONE_PIECE: list[tuple[dict[str, object], str]] = [
    ({"trunk.stages": "1:2:5"}, "trunk.stages: 1:2:5 is not possible; allowed: none"),
    ({"trunk.replicas": 2}, "trunk.replicas: 2 is not possible; allowed: 1"),
    ({"trunk.tensor_parallel": 2}, "trunk.tensor_parallel: 2 is not possible; allowed: 1"),
    ({"trunk.memory": "1GB"}, "trunk.memory: 1GB is not possible; allowed: no limit"),
    ({"network.profile": "home"}, "network.profile: a network is not possible; allowed: none"),
]

NAMES = [words.partition(":")[0] for _, words in ONE_PIECE]


@pytest.mark.parametrize(("settings", "words"), ONE_PIECE, ids=NAMES)
def test_a_trunk_that_is_not_in_one_piece_is_refused_on_both_sides(settings: dict[str, object], words: str) -> None:
    with pytest.raises(SettingError) as refused:
        check_remote(build({**SERVER, **settings}))
    assert str(refused.value).startswith(f"{words} with --trunk.server")
    with pytest.raises(SettingError) as refused:
        check_served(build(settings))
    assert str(refused.value).startswith(f"{words} for fedsplit serve")
    check_remote(build(settings))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ray.address": "auto"}, "ray.address: auto is not possible; allowed: local with --trunk.server"),
        ({"engine": "local", "trunk.schedule": "batched"}, "trunk.schedule: batched is not possible"),
        (
            {"engine": "local", "trunk.schedule": "accumulate", "trunk.every": 2},
            "trunk.schedule: accumulate is not possible",
        ),
    ],
    ids=["cluster", "batched", "accumulate"],
)
def test_an_engine_whose_clients_could_not_use_the_trunk_is_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(SettingError) as refused:
        check_remote(build({**SERVER, **settings}))
    assert str(refused.value).startswith(words)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"engine": "flower", "trunk.schedule": "batched"},
        {"engine": "local", "trunk.schedule": "batched", "deterministic": True},
        {"engine": "local", "trunk.schedule": "accumulate"},
    ],
    ids=str,
)
def test_other_settings_go_with_a_server(settings: dict[str, object]) -> None:
    check_remote(build({**SERVER, **settings}))


@pytest.mark.parametrize("name", ["trunk.token_file", "trunk.tls"])
def test_a_setting_without_an_effect_is_refused_except_from_the_file_of_a_resumed_run(name: str) -> None:
    with pytest.raises(SettingError, match=r"allowed: none without --trunk\.server"):
        check_remote(build({name: "file"}))
    check_remote(build({name: "file", "resume": "run"}))
