"""Runs on a Ray cluster that others have started: several nodes, of which some come, go, or cannot play a part."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from certificates import Authority
from raylets import ROOT, Raylets, environment
from watched_runs import WatchedRun, adapters

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("cluster runs")]  # one process starts the cluster

RUN = ["--clients", "3", "--rounds", "2", "--train.steps", "6", "--batch-size", "2", "--max-length", "32"]
RUN += ["--eval.samples", "4", "--lora-rank", "2", "--deterministic"]

KINDS = {
    "fedsa": ["--trunk.schedule", "copies", "--strategy", "fedsa", "--train.steps", "20"],
    "flora": ["--strategy", "flora"],
}
"""Settings of runs whose clients keep files: parts of the adapter that stay with a client, and folded changes."""

SECONDS = 400.0
"""Longest time of a run, and of any wait: on a busy machine a node takes minutes to start its processes."""

PATIENT = ("--ray.wait", "300")
"""How long a run waits until the nodes have room."""

WORKER, TRUNK = "ClientWorker", "TrunkActor"


class Run(WatchedRun):
    """The command, which is killed if it does not end in time."""

    def __init__(self, cwd: Path, env: dict[str, str], *argv: str) -> None:
        super().__init__(cwd, *RUN, *argv, "--out", "run", env=env)
        self.adapters = cwd / "run"
        self._limit = threading.Timer(SECONDS, self.kill)
        self._limit.daemon = True
        self._limit.start()

    def __exit__(self, *error: Any) -> None:
        self.kill()
        self._limit.cancel()
        super().__exit__(*error)


def wait_until(met: Callable[[], Any]) -> Any:
    """Waits until a function returns something; returns that."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        if found := met():
            return found
        time.sleep(0.05)
    raise AssertionError(f"{met} has not come true for {SECONDS:g} seconds")


def is_at_work(actor: dict[str, Any]) -> bool:
    """Returns whether a client's process plays a client, as Ray has its title say."""
    with contextlib.suppress(psutil.Error):
        return " ".join(psutil.Process(actor["pid"]).cmdline()).startswith(f"ray::{WORKER}.play")
    return False


def node_at_work(raylets: Raylets) -> str | None:
    """Returns a node that was added, and that plays a client."""
    found = [actor for actor in raylets.actors(WORKER) if actor["node"] in raylets.added]
    return next((actor["node"] for actor in found if is_at_work(actor)), None)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[str, dict[str, bytes]]]:
    """Plays each kind of run once, the first one on a Ray of its own; returns the lines shown, and the bytes."""
    known: dict[str, tuple[str, dict[str, bytes]]] = {}

    def play(kind: str) -> tuple[str, dict[str, bytes]]:
        if kind not in known:
            folder = tmp_path_factory.mktemp(kind)
            env = environment(Path("/tmp"), RAY_ADDRESS="127.0.0.1:9")
            # Both engines leave the same bytes, as tests/engines/test_in_process.py shows, and one needs no Ray.
            engine = ["--workers", "2"] if kind == "fedsa" else ["--engine", "local"]
            with Run(folder, env, *KINDS[kind], *engine) as run:
                assert run.end() == (0, ""), run.shown
            known[kind] = run.shown, adapters(run.adapters)
        return known[kind]

    return play


@pytest.fixture(scope="module")
def _raylets() -> Iterator[Raylets]:
    """A cluster's head, of one CPU."""
    with Raylets() as made:
        yield made


@pytest.fixture
def raylets(_raylets: Raylets) -> Iterator[Raylets]:
    """Three nodes of one CPU each, of which a run must leave nothing but what was there, and all of them working."""
    for node in [node for node, site in _raylets.added.items() if site != "b"]:
        _raylets.remove(node)
    while len(_raylets.added) < 2:
        _raylets.add("b")
    _raylets.wait_until_free(cpus=3)
    yield _raylets

    nodes = 1 + len(_raylets.added)
    state = _raylets.wait_until_free(cpus=nodes)
    assert state == {"actors": [], "groups": 0, "free": nodes, "whole": nodes}
    assert _raylets.answering() == nodes
    assert _raylets.left_files_soon() == []


def joining(cwd: Path, raylets: Raylets, *argv: str) -> Run:
    """Starts a command that joins the cluster."""
    cwd.mkdir(exist_ok=True)
    return Run(cwd, raylets.environment(), "--ray.address", raylets.address, *PATIENT, *argv)


def test_a_private_ray_is_used_and_the_address_of_another_is_named(alone: Any) -> None:
    assert "RAY_ADDRESS is set, and not used: --ray.address auto would" in alone("fedsa")[0]


@pytest.mark.parametrize("trunks", [["--trunk.stages", "1:3:5"], ["--trunk.replicas", "2"]])
def test_stages_and_replicas_lie_on_nodes_of_their_own_and_give_the_bytes_of_one_trunk(
    trunks: list[str], raylets: Raylets, alone: Any, tmp_path: Path
) -> None:
    with joining(tmp_path, raylets, *KINDS["fedsa"], *trunks) as run:
        with run.halted("round 1/2"):
            assert len({actor["node"] for actor in raylets.actors(TRUNK)}) == 2
        assert run.end() == (0, ""), run.shown
    assert adapters(run.adapters) == alone("fedsa")[1]


def test_the_folder_of_the_run_may_be_one_that_all_nodes_see(raylets: Raylets, alone: Any, tmp_path: Path) -> None:
    env = raylets.environment(RAY_ADDRESS=raylets.address)
    with Run(tmp_path, env, *KINDS["fedsa"], "--ray.address", "auto", "--data.at", "shared") as run:
        with run.halted("round 1/2"):
            assert raylets.left_files() == []
        assert run.end() == (0, ""), run.shown
    assert adapters(run.adapters) == alone("fedsa")[1]


def test_a_node_that_does_not_see_the_folder_of_the_run_ends_it(raylets: Raylets, tmp_path: Path) -> None:
    """The node sees another folder under the path, as where nothing is mounted there."""
    (tmp_path / "blind").mkdir()
    (tmp_path / "blind" / "sitecustomize.py").write_text(_BLIND)
    raylets.add("blind", PYTHONPATH=f"{tmp_path / 'blind'}:{ROOT}")
    with joining(tmp_path, raylets, "--data.at", "shared", "--client.label", "site=blind") as run:
        code, errors = run.end()
    assert code == 1 and errors.startswith("fedsplit: data.at: ") and errors.count("\n") == 1, errors
    assert "cannot read" in errors and errors.endswith("; shared needs one folder of --out that all nodes see\n")


_BLIND = """
import builtins

see = builtins.open


def open_elsewhere(path, *more, **named):
    return see("/nowhere" if "/run/clients/data/" in str(path) else path, *more, **named)


builtins.open = open_elsewhere
"""
"""What each Python of a node runs first that does not see the clients' data of a run."""


@pytest.mark.parametrize("victim", [WORKER, TRUNK])
def test_a_node_that_is_lost_changes_no_byte(victim: str, raylets: Raylets, alone: Any, tmp_path: Path) -> None:
    place = ["--trunk.label", "site=b"]
    with joining(tmp_path, raylets, *KINDS["fedsa"], *place) as run:
        if victim == TRUNK:
            with run.halted("round 1/2"):
                (trunk,) = raylets.actors(TRUNK)
                raylets.remove(trunk["node"])
        else:
            run.wait_for("round 1/2")
            raylets.remove(wait_until(lambda: node_at_work(raylets)))
        assert run.end() == (0, ""), run.shown
    assert adapters(run.adapters) == alone("fedsa")[1]
    assert ("round 2/2 is played again" if victim == TRUNK else "begins again: The actor") in run.shown
    assert "client-rounds failed" not in run.shown
    assert "(raylet)" not in run.shown, "lines of Ray between the lines of the run"


def test_a_node_that_joins_plays_clients(raylets: Raylets, tmp_path: Path) -> None:
    with joining(tmp_path, raylets, *KINDS["fedsa"], "--rounds", "100") as run:
        run.wait_for("round 1/100")
        added = raylets.add("c")
        wait_until(lambda: any(actor["node"] == added and is_at_work(actor) for actor in raylets.actors(WORKER)))
        assert len(raylets.actors(WORKER)) == 3
        run.send_signal(signal.SIGINT)
        assert run.end()[0] == 130


@pytest.mark.parametrize(
    "argv,words",
    [
        (["--trunk.resources", "GPU=1"], "fedsplit: trunk.resources: GPU=1 is not possible; allowed: at most GPU=0"),
        (["--client.label", "site=nowhere"], "fedsplit: client.label: site=nowhere is not possible; allowed: labels"),
        (["--wire.tls", "tls"], "fedsplit: wire.tls: tls is not possible; allowed: a folder with ca.pem, cert.pem"),
    ],
)
def test_a_request_that_cannot_be_met_is_told(argv: list[str], words: str, raylets: Raylets, tmp_path: Path) -> None:
    with joining(tmp_path, raylets, *argv, "--ray.wait", "1") as run:
        code, errors = run.end()
    assert (code, errors.strip().count("\n")) == (2, 0), errors
    assert errors.strip().startswith(words)
    assert not run.adapters.exists()


def test_two_runs_share_three_nodes_and_give_the_bytes_of_one(raylets: Raylets, alone: Any, tmp_path: Path) -> None:
    """Each run has two client processes, and so has files of clients on another node than its own."""
    parts = ["--workers", "2", "--trunk.resources", "CPU=0.25", "--client.resources", "CPU=0.5"]
    with (
        joining(tmp_path / "one", raylets, *KINDS["fedsa"], *parts) as one,
        joining(tmp_path / "two", raylets, *KINDS["flora"], *parts) as two,
    ):
        with two.halted("round 1/2"):
            assert len({actor["node"] for actor in raylets.actors(WORKER)}) >= 2
            assert raylets.left_files(), "a client on another node has its data in the node's own folder"
        for run in (one, two):
            assert run.end() == (0, ""), run.shown
            assert "played again" not in run.shown
    assert adapters(one.adapters) == alone("fedsa")[1]
    assert adapters(two.adapters) == alone("flora")[1]


def test_a_run_that_is_killed_leaves_the_cluster_as_it_was(raylets: Raylets, tmp_path: Path) -> None:
    """So does one that is stopped, as in `test_a_node_that_joins_plays_clients`."""
    with joining(tmp_path, raylets, *KINDS["fedsa"]) as run:
        run.wait_for("round 1/2")
        run.kill()
        assert run.end()[0] == -signal.SIGKILL


_FAR = """
import socket

connect = socket.socket.connect


def connect_from_afar(self, address):
    if isinstance(address, str) and address.startswith("\\0fedsplit-"):
        raise ConnectionRefusedError(111, "a socket of another machine")
    return connect(self, address)


socket.socket.connect = connect_from_afar
"""
"""What each Python of a far node runs first: the local sockets of this machine are not reached from there."""


def packets_over_sockets(run: Path) -> tuple[int, int]:
    """Returns the packets that came over a socket, and the least number of a run's packets."""
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [event for event in events if event["event"] == "train"]
    steps = sum(event["trunk"]["steps"] for event in trained)
    return trained[-1]["trunk"]["over_socket"], 2 * steps


@pytest.fixture
def old_node(raylets: Raylets, tmp_path: Path) -> str:
    """A far node with a fedsplit of another version, which cannot be imported."""
    (tmp_path / "old" / "fedsplit").mkdir(parents=True)
    (tmp_path / "old" / "fedsplit" / "__init__.py").write_text("raise ImportError('an old version')")
    (tmp_path / "old" / "fedsplit-0.0.1.dist-info").mkdir()
    facts = "Metadata-Version: 2.1\nName: fedsplit\nVersion: 0.0.1\n"
    (tmp_path / "old" / "fedsplit-0.0.1.dist-info" / "METADATA").write_text(facts)
    (tmp_path / "old" / "sitecustomize.py").write_text(_FAR)
    return raylets.add("old", PYTHONPATH=f"{tmp_path / 'old'}:{ROOT}")


def test_a_node_with_another_version_is_named(raylets: Raylets, old_node: str, tmp_path: Path) -> None:
    with joining(tmp_path, raylets) as run:
        code, errors = run.end()
    host = raylets.address.rpartition(":")[0]
    assert code == 2
    assert errors.strip() == (
        f"fedsplit: ray.address: the node {host} has fedsplit 0.0.1, and 0.1.0 is needed; --ray.ship brings it"
    )


def test_the_code_is_brought_to_a_node_with_another_version(
    raylets: Raylets, old_node: str, alone: Any, tmp_path: Path
) -> None:
    with joining(tmp_path, raylets, *KINDS["fedsa"], "--ray.ship", "--client.label", "site=old") as run:
        with run.halted("round 1/2"):
            assert {actor["node"] for actor in raylets.actors(WORKER)} == {old_node}
        assert run.end() == (0, ""), run.shown
    assert adapters(run.adapters) == alone("fedsa")[1]
    over_socket, least = packets_over_sockets(run.adapters)  # in the clear; the next test encrypts them
    assert over_socket >= least > 0
    assert "packets are encrypted" not in run.shown


@pytest.fixture
def far_node(raylets: Raylets, tmp_path: Path) -> str:
    """A node whose processes reach the trunk over TCP alone, as from another machine."""
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "sitecustomize.py").write_text(_FAR)
    return raylets.add("far", PYTHONPATH=f"{tmp_path / 'far'}:{ROOT}")


def test_packets_from_another_node_come_over_tcp_encrypted(
    raylets: Raylets, far_node: str, alone: Any, tmp_path: Path
) -> None:
    tls = ["--wire.tls", str(Authority().folder(tmp_path / "tls").relative_to(tmp_path))]
    with joining(tmp_path, raylets, *KINDS["fedsa"], "--client.label", "site=far", *tls) as run:
        with run.halted("round 1/2"):
            assert {actor["node"] for actor in raylets.actors(WORKER)} == {far_node}
        assert run.end() == (0, ""), run.shown
    assert adapters(run.adapters) == alone("fedsa")[1]
    over_socket, least = packets_over_sockets(run.adapters)
    assert over_socket >= least > 0
    assert "packets are encrypted; what Ray carries, such as adapters and data, is not" in run.shown


def pinning(raylets: Raylets) -> list[str]:
    """Adds two nodes with the data of clients, and returns the nodes."""
    labels = ("0_2", "1")
    return [raylets.add("home", labels={"fedsplit-clients": clients}) for clients in labels]


PINNED = ["--data.at", "label"]


def played(run: Path) -> list[int]:
    """Returns the number of clients whose updates counted, by round."""
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [len(event["clients"]) for event in events if event["event"] == "train"]


def where_played(run: Run, raylets: Raylets) -> set[str]:
    """Waits for the first round, and returns the nodes of the clients' processes."""
    with run.halted("round 1/"):
        return {actor["node"] for actor in raylets.actors(WORKER)}


def nodes_of_clients(shown: str) -> list[str]:
    """Returns the clients of each node, as the table shows them."""
    table = shown[shown.index("clients whose data it has") :].splitlines()[1:3]
    return sorted(line.split(maxsplit=1)[1] for line in table)


def test_clients_are_played_where_their_data_are(raylets: Raylets, alone: Any, tmp_path: Path) -> None:
    homes = pinning(raylets)
    with joining(tmp_path, raylets, *KINDS["flora"], *PINNED) as run:
        assert where_played(run, raylets) == set(homes)
        assert run.end() == (0, ""), run.shown
    assert nodes_of_clients(run.shown) == ["0, 2", "1"]
    shared = "adapter/adapter_model.safetensors"
    assert adapters(run.adapters)[shared] == alone("flora")[1][shared]
    sent = json.loads((run.adapters / "summary.json").read_text())["bytes"]
    folds = sum(path.stat().st_size for path in run.adapters.glob("clients/folds/*"))
    assert sent["client_files_up"] > 0 and folds > 0
    # A separate process deletes the data after the last process of the node has ended.
    wait_until(lambda: not list((raylets.folder / "nodes").glob("*/.fedsplit/run-*/data")))
    assert not list(run.adapters.glob("clients/0*"))


def test_a_client_whose_node_is_lost_fails_and_the_others_go_on(raylets: Raylets, tmp_path: Path) -> None:
    homes = pinning(raylets)
    with joining(tmp_path, raylets, *KINDS["fedsa"], *PINNED, "--rounds", "4") as run:
        run.wait_for("round 1/4")
        raylets.remove(homes[1])
        assert run.end() == (0, ""), run.shown
    assert played(run.adapters)[0] == 3 and played(run.adapters)[-1] == 2, run.shown


def test_a_client_without_a_node_is_named(raylets: Raylets, tmp_path: Path) -> None:
    raylets.add("home", labels={"fedsplit-clients": "0-1"})
    with joining(tmp_path, raylets, *PINNED) as run:
        assert run.end() == (
            2,
            "fedsplit: data.at: label is not possible; allowed: a node for each client, "
            "and none has client 2 in its label fedsplit-clients\n",
        )
    assert not run.adapters.exists()


def test_a_run_with_pinned_clients_goes_on(raylets: Raylets, alone: Any, tmp_path: Path) -> None:
    """What clients keep for themselves stays on their nodes, and is there when the run goes on."""
    homes = pinning(raylets)
    states = "*/.fedsplit/run-*/0*"
    others = {*(raylets.folder / "nodes").glob(states)}  # of earlier runs, which stay on the nodes
    with joining(tmp_path, raylets, *KINDS["fedsa"], *PINNED, "--rounds", "1") as run:
        assert run.end() == (0, ""), run.shown
    assert nodes_of_clients(run.shown) == ["0, 2", "1"]
    env = raylets.environment()
    with WatchedRun(tmp_path, "--resume", "run", "--rounds", "2", env=env) as again:
        with again.halted("goes on after round 1"):
            assert {actor["node"] for actor in raylets.actors(WORKER)} == set(homes)
        assert again.end(SECONDS) == (0, ""), again.shown
    shared = "adapter/adapter_model.safetensors"
    assert adapters(run.adapters)[shared] == alone("fedsa")[1][shared]
    sent = json.loads((run.adapters / "summary.json").read_text())["bytes"]
    assert sent["client_files_up"] == 0 and not list(run.adapters.glob("clients/folds/*"))
    kept = sorted(path.name for path in {*(raylets.folder / "nodes").glob(states)} - others)
    assert kept == ["0000", "0001", "0002"]
    # A separate process deletes the data after the last process of the node has ended.
    wait_until(lambda: not list((raylets.folder / "nodes").glob("*/.fedsplit/run-*/data")))
    assert not list(run.adapters.glob("clients/0*"))


@pytest.fixture
def job_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """A cluster of one node that takes jobs, by the commands of docs/cluster.md; yields its address for jobs."""
    pytest.importorskip("opencensus", reason="ray job submit needs ray[default], which fedsplit does not")
    with tempfile.TemporaryDirectory(prefix="fs-", dir="/tmp") as folder:  # paths of sockets must be short
        env = environment(Path(folder), PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        env["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
        ports = [free_port(), free_port()]
        call = ["ray", "start", "--head", "--block", "--num-cpus", "2", "--temp-dir", folder]
        call += [
            "--port",
            str(ports[0]),
            "--dashboard-port",
            str(ports[1]),
            "--ray-client-server-port",
            str(free_port()),
        ]
        call += ["--min-worker-port", "0", "--max-worker-port", "0"]
        with (
            open(Path(folder) / "head.log", "w+") as log,
            subprocess.Popen(call, stdout=log, stderr=log, env=env, start_new_session=True) as head,
        ):
            try:
                wait_until(lambda: head.poll() is not None or is_open(ports[1]))
                assert head.poll() is None, (Path(folder) / "head.log").read_text()
                yield f"http://127.0.0.1:{ports[1]}", env
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(head.pid, signal.SIGTERM)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def is_open(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def test_a_job_plays_a_run_on_the_cluster(job_server: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    address, env = job_server
    run = [*RUN, "--clients", "2", "--rounds", "1", "--ray.address", "auto", "--out", str(tmp_path / "run")]
    call = ["ray", "job", "submit", "--address", address, "--", "python", "-m", "fedsplit.simulate", *run]
    done = subprocess.run(call, env=env, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "round 1/1" in done.stdout and "succeeded" in done.stdout
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["complete"]
