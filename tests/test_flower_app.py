"""`flwr run .` from a copy of the repository, beside `fedsplit simulate` with the same settings."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.cli.config_utils import load_and_validate
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

ROOT = Path(__file__).parents[1]
COPIED = ("pyproject.toml", "README.md", "LICENSE", ".gitignore", "fedsplit", "strategies")

START_SECONDS = 120.0
RUN_SECONDS = 900.0

STRATEGY = """
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping, FedAvg

def private():
    inner = FedAvg(min_available_nodes=3, min_train_nodes=1, fraction_evaluate=0.0)
    return DifferentialPrivacyClientSideFixedClipping(inner, 0.0, 0.01, 3)
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a user needs of the repository."""
    folder = tmp_path_factory.mktemp("copy")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder)
    return folder


def test_flower_finds_both_apps(copy: Path) -> None:
    config, warnings = load_and_validate(copy / "pyproject.toml")
    components = config["tool"]["flwr"]["app"]["components"]
    assert components == {name: f"fedsplit.flower_app:{name.removesuffix('app')}_app" for name in components}
    assert warnings == []
    from fedsplit import flower_app  # sets the environment of this process, which is undone after the test

    assert isinstance(flower_app.client_app, ClientApp) and isinstance(flower_app.server_app, ServerApp)


def test_a_site_imports_neither_the_servers_side_nor_ray() -> None:
    """Each message of a run starts a process at a site."""
    code = "import sys; from fedsplit import flower_app; flower_app.client_app; import fedsplit.trunk.dialing"
    call = [sys.executable, "-c", f"{code}; print({{'ray', 'fedsplit.commands.server_app'}} & sys.modules.keys())"]
    assert subprocess.run(call, capture_output=True, text=True, check=True).stdout.split() == ["set()"]


def test_the_bundle_carries_no_code(copy: Path, tmp_path: Path) -> None:
    """Each party runs the fedsplit that it has installed, with the weights that no bundle may hold."""
    (tmp_path / "bundle.zip").write_bytes(build_fab_from_disk(copy))
    shutil.unpack_archive(tmp_path / "bundle.zip", tmp_path / "bundle")
    files = {str(path.relative_to(tmp_path / "bundle")) for path in (tmp_path / "bundle").rglob("*") if path.is_file()}
    assert files == {"pyproject.toml", "README.md", ".info/CONTENT"}


@dataclass(frozen=True)
class SuperLink:
    """A SuperLink for simulations on this machine, and the commands that reach it."""

    copy: Path
    env: dict[str, str]

    def flwr(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).parent / "flwr"), *words]
        return subprocess.run(
            command, cwd=self.copy, env=self.env, capture_output=True, text=True, timeout=RUN_SECONDS, check=False
        )

    def last_run(self) -> dict[str, Any]:
        runs: list[dict[str, Any]] = json.loads(self.flwr("ls", "--format", "json").stdout)["runs"]
        return max(runs, key=lambda run: run["pending-at"])


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a SuperLink with all processes that it has started, each by its number."""
    everything = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, left = psutil.wait_procs(everything, timeout=60)
    for one in left:
        one.kill()


@pytest.fixture
def superlink(copy: Path, tmp_path: Path) -> Iterator[SuperLink]:
    """Starts a SuperLink of this test alone, on loopback, with a home of its own."""
    home = tmp_path / "home"
    home.mkdir()
    port = free_port()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    programs = Path(sys.executable).parent
    env = {name: value for name, value in os.environ.items() if not name.startswith(("FLWR_", "RAY_"))}
    env |= {
        "PATH": f"{programs}{os.pathsep}{env['PATH']}",
        "PYTHONPATH": str(copy),
        "HF_HUB_OFFLINE": "1",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }
    where = ["--host", "127.0.0.1", "--port", str(port)]
    command = [str(programs / "flower-superlink"), "--insecure", "--simulation", "--isolation", "subprocess", *where]
    with open(tmp_path / "superlink.log", "wb") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log)
    try:
        wait_until_healthy(process, port, tmp_path / "superlink.log")
        yield SuperLink(copy, env)
    finally:
        end(process)


def wait_until_healthy(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.2)
    raise AssertionError(f"no SuperLink: {log.read_text()}")


def losses_of(run: Path) -> list[tuple[Any, ...]]:
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(event["event"], event.get("round"), event.get("loss"), event.get("clients")) for event in events]


@pytest.mark.slow
def test_flwr_run_leaves_what_simulate_leaves(
    superlink: SuperLink, tmp_path: Path, tiny_models: dict[str, Path], corpus_file: Path
) -> None:
    """Adapters to the bit, losses and counted bytes; with a strategy and a mod of Flower's, which clips."""
    (tmp_path / "mine.py").write_text(STRATEGY)
    shared = {
        "clients": 3,
        "cut": "1:2",
        "model": str(tiny_models["gpt2"]),
        "dataset": str(corpus_file),
        "partition": "natural",
        "strategy": f"{tmp_path}/mine.py:private",
        "mods": "fixedclipping_mod",
        "deterministic": "true",
        "train.max-length": 16,
    }
    flowers = {"num-server-rounds": 2, "local-steps": 2, "batch-size": 2, "out": str(tmp_path / "flower")}
    ours = {"rounds": 2, "train.steps": 2, "train.batch-size": 2, "out": str(tmp_path / "ours")}

    values = {name: value if value == "true" else repr(value) for name, value in (shared | flowers).items()}
    run_config = " ".join(f"{name}={value}" for name, value in values.items())
    nodes = "num-supernodes=3 client-resources-num-cpus=1"
    done = superlink.flwr("run", ".", "--stream", "--federation-config", nodes, "--run-config", run_config)
    assert done.returncode == 0, done.stdout + done.stderr
    assert superlink.last_run()["status"] == "finished:completed", done.stdout + done.stderr

    words = [f"--{name}={value}" for name, value in (shared | ours).items()]
    command = [sys.executable, "-m", "fedsplit.simulate", *words]
    subprocess.run(command, cwd=superlink.copy, env=superlink.env, timeout=RUN_SECONDS, check=True)

    theirs, expected = tmp_path / "flower", tmp_path / "ours"
    tensors = sorted(path.relative_to(expected) for path in expected.rglob("*.safetensors"))
    assert len(tensors) >= 4
    for path in tensors:
        assert (theirs / path).read_bytes() == (expected / path).read_bytes(), path
    assert losses_of(theirs) == losses_of(expected)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (theirs, expected)]
    for name in ("eval_loss", "bytes", "tokens", "parameters", "client_rounds", "complete"):
        assert summaries[0][name] == summaries[1][name], name
    configs = [tomllib.loads((run / "config.toml").read_text()) for run in (theirs, expected)]
    assert {name for name in configs[0] if configs[0][name] != configs[1][name]} == {"engine"}


@pytest.mark.slow
def test_a_wrong_run_configuration_fails_with_the_lines_of_the_command(superlink: SuperLink, tmp_path: Path) -> None:
    words = f"num-server-rounds=0 lora.rank='x' clients=5 out='{tmp_path / 'run'}'"
    superlink.flwr("run", ".", "--stream", "--run-config", words)
    run = superlink.last_run()
    assert run["status"] == "finished:failed"
    assert "rounds: 0 is not possible; allowed: a whole number from 1" in run["status-details"]
    assert "lora.rank: x is not possible; allowed: whole numbers" in run["status-details"]
    assert not (tmp_path / "run").exists()
