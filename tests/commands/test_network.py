"""The command `network`: traces become files that a run takes, and wrong files become one line."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from fedsplit.commands.network import main
from fedsplit.settings.documents import build

DEVICES = {number: {"computation": 50.0, "communication": 1000.0 * (number + 1)} for number in range(4)}


def test_a_named_network_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "home", "--clients", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["client", "uplink_mbps", "downlink_mbps"] and len(lines) == 4
    assert lines[1].split()[:3] == ["0", "10", "30"]
    assert lines[3].split() == ["trunk", "1000", "1000"]


def test_the_trunk_has_a_row_and_no_number_is_rounded_to_a_whole_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "net.toml"
    file.write_text('[default]\nprofile = "home"\navailability = 0.999999999\n[trunk]\nuplink_mbps = 5\n')
    assert main(["show", str(file), "--clients", "1"]) == 0
    _, client, trunk = capsys.readouterr().out.splitlines()
    assert client.split()[-1] == "0.999999999" and trunk.split() == ["trunk", "5", "1000"]


def test_a_date_in_a_file_is_named_with_its_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "net.toml"
    file.write_text('[default]\nprofile = "home"\n[[clients]]\nshare = 0.5\nrtt_ms = 2020-01-01\n')
    assert main(["show", str(file)]) == 2
    assert "network.profile.clients, item 1.rtt_ms: 2020-01-01 is not possible" in capsys.readouterr().err


def test_clients_by_name_have_rows_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "net.toml"
    file.write_text('[default]\nprofile = "home"\n[[clients]]\nclients = [1, "ann"]\nuplink_mbps = 2\n')
    assert main(["show", str(file), "--clients", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["0", "10"], ["1", "2"], ["ann", "2"], ["trunk", "1000"]]
    assert main(["show", str(file), "--clients", "1"]) == 2


def test_pickles_are_read_on_request_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, out = tmp_path / "client_device_capacity", tmp_path / "net.toml"
    trace.write_bytes(pickle.dumps(DEVICES))
    call = ["fedscale", str(trace), "--clients", "3", "--out", str(out)]
    assert main(call) == 2
    assert "is not unpickled unless --unpickle asks for it" in capsys.readouterr().err and not out.exists()
    assert main([*call, "--unpickle"]) == 0
    assert json.loads(build({"network.profile": str(out), "clients": 3}).network.profile)["default"]["rtt_ms"] == 50
    assert main([*call, "--unpickle"]) == 2  # the file exists
    assert "cannot be written" in capsys.readouterr().err


def test_json_needs_no_request(tmp_path: Path) -> None:
    (tmp_path / "devices.json").write_text(json.dumps([{"tcp_speed_results": [4000]}]))
    call = ["flhetbench", str(tmp_path / "devices.json"), "--clients", "2", "--out", str(tmp_path / "net.toml")]
    assert main(call) == 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (["show", "hom"], "hom is not possible"),
        (["show", "home", "--clients", "0"], "--clients: 0 is not possible; allowed: a whole number from 1 to 100000"),
        (["show", "home", "--clients", "1000000000"], "--clients: 1000000000 is not possible"),
        (["show", "home", "--clients", "x"], "--clients: x is not possible"),
        (["fedscale", "nowhere", "--out", "x"], "nowhere cannot be read"),
        (["flhetbench", "SECURITY.md", "--out", "x"], "SECURITY.md is no JSON"),
        (["show", "home", "--nope", "1"], "there is no flag --nope"),
        (["measure", "--out", "x", "--clients", "0"], "clients: 0 is not possible"),
        ([], "required"),
    ],
)
def test_wrong_calls_are_one_line(call: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(call) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and words in lines[0]
