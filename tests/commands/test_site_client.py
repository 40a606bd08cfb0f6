"""`fedsplit client`: what is wrong at a site is told before a SuperNode starts; and a federation of two sites."""

from __future__ import annotations

import os
import runpy
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from fedsplit.commands import site_client
from fedsplit.federation.client_site import NODE_KEY, read_site
from fedsplit.state.site_lock import locked

ROOT = Path(__file__).parents[2]


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A command line without an error."""
    (tmp_path / "notes.jsonl").write_text('{"text": "a note"}\n')
    (tmp_path / "token").write_text("0" * 64 + "\n")
    (tmp_path / "token").chmod(0o600)
    flags = ["--superlink", "127.0.0.1:9", "--insecure", "--client", "1", "--name", "ward a"]
    flags += ["--folder", str(tmp_path / "state"), "--dataset", str(tmp_path / "notes.jsonl")]
    return [*flags, "--server", "127.0.0.1:50052", "--token-file", str(tmp_path / "token")]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Command lines of SuperNodes, which end at once."""
    calls: list[list[str]] = []

    class Ended:
        returncode = 7

        def __init__(self, call: list[str], pass_fds: tuple[int, ...], env: dict[str, str]) -> None:
            calls.append(call)
            assert env["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)  # Flower starts more by name

        def __enter__(self) -> Ended:
            return self

        def __exit__(self, *error: object) -> None: ...

        def wait(self, timeout: float | None = None) -> int:
            return 7

        def terminate(self) -> None: ...

    monkeypatch.setattr(subprocess, "Popen", Ended)
    return calls


def test_a_supernode_starts_with_the_file_of_the_site(
    words: list[str], started: list[list[str]], tmp_path: Path
) -> None:
    assert site_client.main([*words, "--port", "1234"]) == 7  # the SuperNode's own exit code
    (call,) = started
    file = tmp_path / "state" / "site.toml"
    assert Path(call[0]).name == "flower-supernode"
    assert call[1:] == [
        *("--superlink", "127.0.0.1:9", "--node-config", f'{NODE_KEY}="{file}"', "--port", "1234", "--insecure")
    ]
    site = read_site(file)
    assert (site.client, site.name, site.allows_code) == (1, "ward a", False)
    assert site.settings["trunk.server"] == "127.0.0.1:50052"
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_data_of_earlier_runs_are_removed(words: list[str], started: list[list[str]], tmp_path: Path) -> None:
    left = tmp_path / "state" / ("0" * 32)
    (left / "data").mkdir(parents=True)
    (left / "data" / "0001.safetensors").write_bytes(b"text")
    (left / "0001").mkdir()
    site_client.main(words)
    assert not (left / "data").exists() and (left / "0001").exists()


def test_after_a_kill_the_client_waits_until_the_superlink_has_noticed(
    words: list[str],
    started: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Flower refuses a second SuperNode with the same key for a minute; it is not asked before."""
    waits: list[float] = []
    monkeypatch.setattr("fedsplit.commands.site_client.time.sleep", waits.append)
    monkeypatch.setattr(subprocess.Popen, "returncode", -9)
    assert site_client.main(words) == 7
    assert waits == []
    monkeypatch.setattr(subprocess.Popen, "returncode", 7)
    assert site_client.main(words) == 7
    assert waits == [65.0]
    assert "the client before was killed; starting in 65 seconds" in capsys.readouterr().out
    assert site_client.main(words) == 7
    assert waits == [65.0]


def test_a_folder_at_which_another_client_works_is_refused(
    words: list[str], started: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "state" / ("0" * 32) / "data"
    data.mkdir(parents=True)
    (data / "0001.safetensors").write_bytes(b"text")
    with locked(tmp_path / "state"):
        assert site_client.main(words) == 2
    assert "a folder in which no other client is at work" in capsys.readouterr().err
    assert started == [] and (data / "0001.safetensors").exists()


def test_flags_take_precedence_over_the_file(words: list[str], started: list[list[str]], tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text('client = 4\nname = "ward b"\n[data]\ntext = "note"\n')
    assert site_client.main([*words, "--site", str(tmp_path / "site.toml")]) == 7
    site = read_site(tmp_path / "state" / "site.toml")
    assert (site.client, site.name, site.settings["data.text"]) == (1, "ward a", "note")


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--dataset", "absent.jsonl"], "dataset: absent.jsonl is not possible"),
        (["--client", "-1"], "client: -1 is not possible; allowed: a whole number from 0"),
        (["--server", "nowhere"], "trunk.server: nowhere is not possible"),
        (["--server", "trunk.example:1"], "trunk.server: trunk.example:1 is not possible; allowed: an address of this"),
        (["--token-file", "absent"], "trunk.token_file: absent is not possible"),
        (["--tls", "absent"], "trunk.tls: absent is not possible; allowed: a folder with the client's ca.pem"),
        (["--superlink", "nonsense"], "superlink: nonsense is not possible; allowed: HOST:PORT"),
        (["--folder", "/dev/null"], "folder: /dev/null is not possible; allowed: a folder"),
        (
            ["--superlink", "hospital.example:9"],
            "superlink: hospital.example:9 is not possible; allowed: an address of",
        ),
        (["--key", "absent"], "key: absent is not possible; allowed: a file that is there"),
        (["--root-certificates", "ca.pem"], "argument --root-certificates: not allowed with argument --insecure"),
        (["--site", "absent.toml"], "config: absent.toml is not possible"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_wrong_is_told_in_a_line_and_nothing_starts(
    flags: list[str], line: str, words: list[str], started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert site_client.main([*words, *flags]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert any(error.startswith(f"fedsplit: {line}") for error in errors), errors
    assert started == []


def test_all_that_is_missing_is_told_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert site_client.main([]) == 2
    assert "--superlink" in capsys.readouterr().err
    assert site_client.main(["--superlink", "127.0.0.1:9", "--insecure"]) == 2
    lines = capsys.readouterr().err.splitlines()
    for name in ("client", "name", "folder", "dataset", "trunk.server"):
        assert any(line.startswith(f"fedsplit: {name}: ") for line in lines), name


@pytest.mark.slow
def test_two_hospitals_leave_the_adapter_of_their_simulation() -> None:
    """SuperLink with TLS, two SuperNodes with keys, the trunk behind gRPC with certificates; one site is killed."""
    script = ROOT / "examples" / "two-hospitals" / "two_hospitals.py"
    env: dict[str, Any] = {**os.environ, "PYTHONPATH": str(ROOT)}
    with_users = os.geteuid() == 0 and runpy.run_path(str(script))["others_can_start"]()
    with tempfile.TemporaryDirectory() as folder:  # other users may not enter pytest's
        call = [sys.executable, str(script), "--folder", folder, "--kill", *["--users"] * with_users]
        done = subprocess.run(call, env=env, capture_output=True, text=True, timeout=1500, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = done.stdout.splitlines()
        assert lines[-1] == "both adapters are equal to the bit"
        assert any("Node Unavailable" in line for line in lines), done.stdout  # north was missed, and did its part anew
        assert sum(line.endswith("can read 0 files of the other parties") for line in lines) == 5 * with_users
        for party in ("trunk", "server", "operator"):
            files = [path for path in (Path(folder) / party).rglob("*") if path.is_file()]
            assert [path.name for path in files if path.suffix == ".jsonl"] == ["metrics.jsonl"] * (party == "server")
            assert not any(b"came with" in path.read_bytes() for path in files)  # no note has left its hospital
