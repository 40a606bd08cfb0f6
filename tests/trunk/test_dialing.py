"""Connections to a trunk's server: who calls, with which certificate, and what is wrong before anybody calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedsplit.errors import SettingError
from fedsplit.settings.config import Config
from fedsplit.settings.documents import build
from fedsplit.trunk import dialing
from fedsplit.trunk.dialing import check_server, dial_of, find_remote
from fedsplit.wire.certificate_set import write_set
from fedsplit.wire.grpc_address import GrpcAddress
from fedsplit.wire.tls import KEY
from fedsplit.wire.token_files import own_token


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dialing") / "set"
    write_set(folder, ["north", "south"])
    return folder


def config_with(tmp_path: Path, **settings: object) -> Config:
    token = tmp_path / "run.token"
    own_token(token)
    values = {"clients": 2, "trunk.server": "127.0.0.1:50052", "trunk.token_file": str(token)}
    return build({**values, **{name.replace("__", "."): value for name, value in settings.items()}})


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []

    def client(address: GrpcAddress, number: int | None, *, patience: float, silence: float) -> Any:
        assert silence == Config().timeout
        calls.append((address, number, patience))

    monkeypatch.setattr(dialing, "GrpcClient", client)
    return calls


def test_every_party_calls_with_the_token_and_its_own_certificate(
    called: list[Any], certificates: Path, tmp_path: Path
) -> None:
    config = config_with(tmp_path, trunk__tls=str(certificates), trunk__wait=7)
    token = own_token(tmp_path / "run.token")
    for client in (None, 1):
        dial_of(config)(client)
    dial_of(config, patience=3.0)(0)
    parties = [("federation", None, 7.0), ("clients/south", 1, 7.0), ("clients/north", 0, 3.0)]
    assert called == [
        (GrpcAddress("127.0.0.1", 50052, str(certificates / folder), token), client, patience)
        for folder, client, patience in parties
    ]


def test_without_certificates_a_client_says_its_number(called: list[Any], tmp_path: Path) -> None:
    dial_of(config_with(tmp_path))(1)
    ((address, client, _),) = called
    assert (address.tls, client) == ("", 1)


def test_clients_of_a_process_find_the_run_by_its_name(tmp_path: Path) -> None:
    assert find_remote("trunk-1", config_with(tmp_path)).run == "trunk-1"


def test_a_run_with_a_trunk_of_its_own_and_a_good_one_pass(certificates: Path, tmp_path: Path) -> None:
    check_server(Config())
    check_server(config_with(tmp_path))
    check_server(config_with(tmp_path, trunk__tls=str(certificates), trunk__server="trunk.example:50052"))


def test_what_cannot_be_used_is_named(certificates: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    write_set(broken, ["north", "south"])
    (broken / "clients" / "south" / KEY).unlink()
    cases: list[tuple[dict[str, object], str]] = [
        ({"trunk__token_file": ""}, "trunk.token_file: nothing is not possible; allowed: the file with the token"),
        ({"trunk__token_file": "nowhere"}, "trunk.token_file: nowhere is not possible"),
        ({"trunk__server": "10.0.0.7:1"}, "trunk.server: 10.0.0.7:1 is not possible; allowed: an address of this"),
        ({"trunk__tls": str(tmp_path)}, f"trunk.tls: {tmp_path} is not possible; allowed: a folder that fedsplit"),
        ({"trunk__tls": str(certificates), "clients": 3}, "(client 2 has no certificate)"),
        ({"trunk__tls": str(broken)}, "south/key.pem: No such file or directory)"),
    ]
    for settings, words in cases:
        with pytest.raises(SettingError) as refused:
            check_server(config_with(tmp_path, **settings))
        assert words in str(refused.value)
        assert "\n" not in str(refused.value)
