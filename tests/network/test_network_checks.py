"""Checks of a network before a run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from fedsplit.errors import InputError, SettingError
from fedsplit.network import network_checks
from fedsplit.network.network_checks import check_client_names, check_network
from fedsplit.settings.documents import build

THREE = {"default": {"profile": "home"}, "clients": [{"clients": [3]}]}


def test_settings_without_a_network_have_no_effect() -> None:
    check_network(build({}))
    with pytest.raises(InputError) as refused:
        check_network(build({"network.over_select": 2, "network.trunk_tflops": 3, "network.compute": {"a": 1}}))
    assert [error.setting for error in refused.value.errors if isinstance(error, SettingError)] == [
        "network.trunk_tflops",
        "network.compute",
        "network.over_select",
    ]


def test_a_client_beyond_the_last_is_refused_before_the_data_are_read() -> None:
    check_network(build({"network.profile": THREE, "clients": 4}))
    with pytest.raises(InputError, match="3 is not possible; allowed: the number of a client, from 0 to 2"):
        check_network(build({"network.profile": THREE, "clients": 3}))


def test_names_are_checked_with_the_data() -> None:
    config = build({"network.profile": {**THREE, "clients": [{"clients": ["ann"]}]}})
    check_network(config)
    check_client_names(config, ["ann", "bob"])
    with pytest.raises(InputError, match="ann is not possible"):
        check_client_names(config, ["bob"])


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_checks, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None)))
    with pytest.raises(InputError, match=r"install fedsplit\[network\]"):
        check_network(build({"network.profile": "home"}))


def test_a_file_becomes_part_of_the_settings(tmp_path: Path) -> None:
    file = tmp_path / "net.toml"
    file.write_text('[default]\nprofile = "home"\ncompute = 0.5\n')
    config = build({"network.profile": str(file)})
    assert config.network.profile == '{"default": {"compute": 0.5, "profile": "home"}}'
    for content, words in (("[default", "a TOML file"), (None, "or a TOML file of profiles")):
        file.unlink()
        if content is not None:
            file.write_text(content)
        with pytest.raises(InputError, match=f"^network.profile: .*net.toml is not possible; allowed: .*{words}"):
            build({"network.profile": str(file)})
        file.touch()


def test_a_file_without_compute_times_is_named(tmp_path: Path) -> None:
    file = tmp_path / "times.toml"
    file.write_text("[default]\nuplink_mbps = 1\n")
    with pytest.raises(InputError, match=r"^network.compute: .*times.toml is not possible; .* a table seconds_a_token"):
        build({"network.compute": str(file)})
    file.write_text("[seconds_a_token]\nother = 1\n")
    with pytest.raises(InputError, match="a table seconds_a_token with other is not possible"):
        check_network(build({"network.profile": "home", "network.compute": str(file)}))


@pytest.mark.parametrize("setting", ["network.client_tflops", "network.trunk_tflops"])
@pytest.mark.parametrize("value", [1e-300, 0, 1e7])
def test_no_speed_is_beyond_all_devices(setting: str, value: float) -> None:
    with pytest.raises(InputError, match=f"^{setting}: .*a number from 1e-06 to 1000000"):
        build({setting: value})
