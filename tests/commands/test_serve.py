"""The command that offers a trunk: ready in a line, stopped by a signal, and a run that uses it ends as any other."""

from __future__ import annotations

import json
import signal
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served_trunks import Served, simulate
from watched_runs import WatchedRun, adapters

from fedsplit.commands.serve import LIMITS, load_config, main, serving
from fedsplit.settings.config import Config
from fedsplit.wire.certificate_set import write_set
from fedsplit.wire.limits import Limits

SETTINGS = """
clients = 2
rounds = 2
threads = 1
workers = 2
timeout = 120
kernels = "library"

[lora]
rank = 2

[train]
steps = 3
batch_size = 2
max_length = 16
micro_batches = 1
optimizer = "sgd"
lr = 0.1

[eval]
samples = 1

[trunk]
schedule = "copies"
threads = 1
lanes = 1
"""

SECONDS = 300
"""Longest wait for a run."""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Settings of runs whose results do not depend on the order of the clients' steps."""
    path = tmp_path / "mine.toml"
    path.write_text(SETTINGS)
    return path


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Adapters of a run whose trunk is its own."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "mine.toml").write_text(SETTINGS)
    done = simulate(folder, ["--config", "mine.toml", "--engine", "local", "--workers", "1", "--out", "run"])
    assert done.returncode == 0, done.stderr
    return adapters(folder / "run")


def summary_of(run: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return summary


def test_every_limit_has_a_flag() -> None:
    assert LIMITS.keys() == vars(Limits()).keys()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray", "flower"])
def test_two_runs_after_one_another_leave_the_adapters_of_a_trunk_of_their_own(
    engine: str, config: Path, own: dict[str, bytes], tmp_path: Path
) -> None:
    """On every engine, to the bit; the trunk goes on after them, and ends by a signal without a word."""
    workers = ["--workers", "1"] if engine == "local" else []
    with Served(tmp_path, config) as served:
        assert stat.S_IMODE((tmp_path / "mine.token").stat().st_mode) == 0o600
        token = (tmp_path / "mine.token").read_text().strip()
        for name in ("first", "second"):
            flags = ["--config", "mine.toml", "--engine", engine, *workers, *served.flags]
            done = simulate(tmp_path, [*flags, "--trunk.token-file", "mine.token", "--out", name])
            assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
            assert adapters(tmp_path / name) == own
            assert token not in done.stdout + (tmp_path / name / "config.toml").read_text()
        served.send_signal(signal.SIGTERM)
        assert served.wait(SECONDS) == 143
        served._reader.join(SECONDS)
    assert served.said[1:] == ["fedsplit: stopped\n"]
    assert token not in served.said[0]


@pytest.mark.slow
def test_with_certificates_every_client_calls_as_itself(config: Path, own: dict[str, bytes], tmp_path: Path) -> None:
    write_set(tmp_path / "set", ["north", "south"])
    with Served(tmp_path, config, "--tls", "set/trunk") as served:
        flags = ["--config", "mine.toml", "--engine", "ray", *served.flags, "--trunk.tls", "set"]
        done = simulate(tmp_path, [*flags, "--trunk.token-file", "mine.token", "--out", "run"])
        assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
        assert adapters(tmp_path / "run") == own

        plain = simulate(tmp_path, [*flags[:-2], "--trunk.token-file", "mine.token", "--out", "plain"])
        assert plain.returncode == 1 and plain.stderr.startswith("fedsplit: no trunk answers at 127.0.0.1:")
        assert len(plain.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_trunk_that_is_killed_and_started_again_changes_no_number(
    engine: str, config: Path, own: dict[str, bytes], tmp_path: Path
) -> None:
    workers = ["--workers", "1"] if engine == "local" else []
    with Served(tmp_path, config) as first:
        flags = ["--config", "mine.toml", "--engine", engine, *workers, *first.flags]
        flags += ["--trunk.token-file", "mine.token", "--trunk.wait", str(SECONDS), "--report", "false"]
        run = WatchedRun(tmp_path, *flags, "--out", "run")
        with run.halted("round 1/2"):
            first.kill()
            first.wait()
        with Served(tmp_path, config, port=first.port):
            code, errors = run.end(SECONDS)
    assert code == 0, run.shown + errors
    assert "round 2/2 is played again: " in run.shown
    assert adapters(tmp_path / "run") == own


@pytest.mark.slow
def test_a_run_whose_command_was_killed_goes_on_at_its_server_at_once(
    config: Path, own: dict[str, bytes], tmp_path: Path
) -> None:
    """The dead command has taken no leave of the server, which refuses the runs of others still."""
    with Served(tmp_path, config) as server:
        flags = ["--config", "mine.toml", "--engine", "local", "--workers", "1", "--report", "false", *server.flags]
        flags += ["--trunk.token-file", "mine.token"]
        run = WatchedRun(tmp_path, *flags, "--out", "run")
        with run.halted("round 1/2"):
            run.kill()
        run.end(SECONDS)
        code, errors = WatchedRun(tmp_path, *flags, "--out", "other").end(SECONDS)
        assert code == 2 and "a trunk that serves no other run now" in errors
        resumed = WatchedRun(tmp_path, "--resume", "run")
        code, errors = resumed.end(SECONDS)
    assert code == 0, resumed.shown + errors
    assert adapters(tmp_path / "run") == own


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Served]]:
    folder = tmp_path_factory.mktemp("served")
    (folder / "mine.toml").write_text(SETTINGS)
    with Served(folder, Path("mine.toml")) as command:
        yield folder, command


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "code", "line"),
    [
        (["--seed", "7"], 2, "these differ: seed (0 at the trunk, 7 in the run)"),
        (["--trunk.token-file", "other.token"], 2, "the token of the run is missing or wrong"),
        (["--trunk.token-file", "none.token"], 2, "trunk.token_file: none.token is not possible"),
        (["--trunk.server", "127.0.0.1:{free}"], 1, "no trunk answers at 127.0.0.1:{free} ("),
    ],
    ids=["settings", "wrong token", "no token", "nobody"],
)
def test_what_does_not_fit_is_told_in_a_line(
    flags: list[str], code: int, line: str, served: tuple[Path, Served], tmp_path: Path
) -> None:
    folder, command = served
    (folder / "other.token").write_text("0" * 64)
    (folder / "other.token").chmod(0o600)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and not listening: nobody else gets the port
        free = str(taken.getsockname()[1])
        asked = ["--config", "mine.toml", "--engine", "local", "--workers", "1", *command.flags]
        asked += ["--trunk.token-file", "mine.token", *(flag.replace("{free}", free) for flag in flags)]
        done = simulate(folder, [*asked, "--out", str(tmp_path / "run")])
    assert done.returncode == code, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("fedsplit: ") and line.replace("{free}", free) in lines[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "flags", "line"),
    [
        (None, [], "run: nowhere.toml is not possible; allowed: a TOML file that can be read"),
        ("clients = 0", [], "clients: 0"),
        ('cut = "1:99"', [], "cut: 1:99 is not possible"),
        ("[trunk]\nreplicas = 2", [], "trunk.replicas: 2 is not possible; allowed: 1 for fedsplit serve"),
        ("[network]\nprofile = 'home'", [], "network.profile: a network is not possible; allowed: none for"),
        ("", ["--port", "70000"], "port: 70000 is not possible; allowed: a whole number from 0 to 65535"),
        ("", ["--limits.window", "1"], "window: 1 is not possible"),
        ("", ["--tls", "nowhere"], "nowhere/clients.toml: No such file or directory"),
        ("", ["--token-file", "no/token"], "no/token: No such file or directory"),
    ],
    ids=["file", "value", "cut", "replicas", "network", "port", "limit", "tls", "token"],
)
def test_wrong_input_is_told_in_a_line_before_a_weight_is_loaded(
    settings: str | None,
    flags: list[str],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fedsplit.commands.serve.load_trunk", lambda config: pytest.fail("loaded"))
    if settings is not None:
        Path("mine.toml").write_text(settings)
    assert main(["--run", "nowhere.toml" if settings is None else "mine.toml", *flags]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("fedsplit: ") and line in lines[0]
    assert not Path("mine.token").exists()


class NoTrunk:
    """A trunk for a command that nobody calls."""

    def __init__(self, config: Config) -> None:
        self.is_closed = False

    def serve(self, *arguments: Any) -> None:
        raise NotImplementedError

    control = serve

    def close(self) -> None:
        self.is_closed = True


def test_the_command_says_when_it_is_ready_and_closes_the_trunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trunks: list[NoTrunk] = []

    def load(config: Config) -> NoTrunk:
        trunks.append(NoTrunk(config))
        return trunks[-1]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fedsplit.commands.serve.load_trunk", load)
    Path("mine.toml").write_text("")
    ready: list[str] = []
    assert main(["--run", "mine.toml", "--port", "0"], wait=lambda: ready.append(capsys.readouterr().out)) == 0
    (line,) = ready
    assert line.startswith("trunk ready at 127.0.0.1:")
    assert line.endswith(": model sotu-gpt2, blocks 1:5, no encryption, token in mine.token\n")
    assert [trunk.is_closed for trunk in trunks] == [True]
    assert stat.S_IMODE(Path("mine.token").stat().st_mode) == 0o600


def test_an_error_of_the_system_after_the_start_is_not_one_of_the_port(config: Path, tmp_path: Path) -> None:
    opened = serving(load_config(config), "127.0.0.1", 0, None, tmp_path / "run.token", {})
    with pytest.raises(BrokenPipeError), opened:
        raise BrokenPipeError(32, "the reader has gone")


def test_a_port_that_is_taken_is_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fedsplit.commands.serve.load_trunk", NoTrunk)
    Path("mine.toml").write_text("")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["--run", "mine.toml", "--port", port], wait=lambda: pytest.fail("served")) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("fedsplit: port: gRPC cannot listen at 127.0.0.1:")


def test_the_settings_of_a_finished_run_are_those_of_its_trunk(tmp_path: Path) -> None:
    """As `config.toml` in the folder of a run holds them."""
    (tmp_path / "config.toml").write_text('clients = 3\n[trunk]\nserver = "127.0.0.1:1"\ntoken_file = "gone"\n')
    assert load_config(tmp_path / "config.toml").clients == 3
