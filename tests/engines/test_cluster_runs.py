"""Runs on a Ray cluster that others have started: several nodes, of which some come, go, or cannot play a part."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from raylets import ROOT, Raylets, environment
from watched_runs import WatchedRun, adapters

pytestmark = pytest.mark.slow

RUN = ["--clients", "3", "--rounds", "2", "--train.steps", "6", "--batch-size", "2", "--max-length", "32"]
RUN += ["--eval.samples", "4", "--lora-rank", "2", "--deterministic"]

KINDS = {
    "fedsa": ["--trunk.schedule", "copies", "--strategy", "fedsa", "--train.steps", "20"],
    "flora": ["--strategy", "flora"],
}
"""Settings of runs whose clients keep files: parts of the adapter that stay with a client, and folded changes."""

SECONDS = 120.0
"""Longest time of a run, and of any wait."""

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


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[str, dict[str, bytes]]]:
    """Plays each kind of run once on a Ray of its own; returns the lines shown, and the bytes."""
    known: dict[str, tuple[str, dict[str, bytes]]] = {}

    def play(kind: str) -> tuple[str, dict[str, bytes]]:
        if kind not in known:
            folder = tmp_path_factory.mktemp(kind)
            env = environment(Path("/tmp"), RAY_ADDRESS="127.0.0.1:9")
            with Run(folder, env, *KINDS[kind], "--workers", "2") as run:
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
    return Run(cwd, raylets.environment(), "--ray.address", raylets.address, *argv)


def test_a_private_ray_is_used_and_the_address_of_another_is_named(alone: Any) -> None:
    assert "RAY_ADDRESS is set, and not used: --ray.address auto would" in alone("fedsa")[0]


@pytest.mark.parametrize("kind", KINDS)
def test_three_nodes_give_the_bytes_of_one(kind: str, raylets: Raylets, alone: Any, tmp_path: Path) -> None:
    with joining(tmp_path, raylets, *KINDS[kind]) as run:
        run.wait_for("round 1/2")
        assert len({actor["node"] for actor in raylets.actors(WORKER)}) == 2
        assert raylets.left_files(), "a client on another node has its data in the node's own folder"
        assert run.end() == (0, ""), run.shown
    assert adapters(run.adapters) == alone(kind)[1]
    assert "played again" not in run.shown


def test_the_folder_of_the_run_may_be_one_that_all_nodes_see(raylets: Raylets, alone: Any, tmp_path: Path) -> None:
    env = raylets.environment(RAY_ADDRESS=raylets.address)
    with Run(tmp_path, env, *KINDS["fedsa"], "--ray.address", "auto", "--data.at", "shared") as run:
        run.wait_for("round 1/2")
        assert raylets.left_files() == []
        assert run.end() == (0, ""), run.shown
    assert adapters(run.adapters) == alone("fedsa")[1]


@pytest.mark.parametrize("victim", [WORKER, TRUNK])
def test_a_node_that_is_lost_changes_no_byte(victim: str, raylets: Raylets, alone: Any, tmp_path: Path) -> None:
    place = ["--trunk.label", "site=b"]
    with joining(tmp_path, raylets, *KINDS["fedsa"], *place) as run:
        run.wait_for("round 1/2")

        def doomed() -> str | None:
            found = [actor for actor in raylets.actors(victim) if actor["node"] in raylets.added]
            return next((actor["node"] for actor in found if victim == TRUNK or is_at_work(actor)), None)

        raylets.remove(wait_until(doomed))
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
        (["--client.resources", "CPU=2"], "fedsplit: client.resources: CPU=2 is not possible; allowed: at most CPU=1"),
        (["--client.label", "site=nowhere"], "fedsplit: client.label: site=nowhere is not possible; allowed: labels"),
        (["--trunk.label", "site=nowhere"], "fedsplit: trunk.label: site=nowhere is not possible; allowed: labels"),
    ],
)
def test_a_request_that_cannot_be_met_is_told(argv: list[str], words: str, raylets: Raylets, tmp_path: Path) -> None:
    with joining(tmp_path, raylets, *argv, "--ray.wait", "1") as run:
        code, errors = run.end()
    assert (code, errors.strip().count("\n")) == (2, 0), errors
    assert errors.strip().startswith(words)
    assert not run.adapters.exists()


def test_two_runs_share_a_cluster(raylets: Raylets, alone: Any, tmp_path: Path) -> None:
    least = ["--workers", "1", "--trunk.resources", "CPU=0.25", "--client.resources", "CPU=0.5"]
    with (
        joining(tmp_path / "one", raylets, *KINDS["fedsa"], *least) as one,
        joining(tmp_path / "two", raylets, *KINDS["flora"], *least) as two,
    ):
        assert one.end() == (0, ""), one.shown
        assert two.end() == (0, ""), two.shown
    assert adapters(one.adapters) == alone("fedsa")[1]
    assert adapters(two.adapters) == alone("flora")[1]


@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_run_that_is_stopped_leaves_the_cluster_as_it_was(
    number: int, code: int, raylets: Raylets, tmp_path: Path
) -> None:
    with joining(tmp_path, raylets, *KINDS["fedsa"]) as run:
        run.wait_for("round 1/2")
        run.send_signal(number)
        assert run.end()[0] == code


@pytest.fixture
def old_node(raylets: Raylets, tmp_path: Path) -> str:
    """A node with a fedsplit of another version, which cannot be imported."""
    (tmp_path / "old" / "fedsplit").mkdir(parents=True)
    (tmp_path / "old" / "fedsplit" / "__init__.py").write_text("raise ImportError('an old version')")
    (tmp_path / "old" / "fedsplit-0.0.1.dist-info").mkdir()
    facts = "Metadata-Version: 2.1\nName: fedsplit\nVersion: 0.0.1\n"
    (tmp_path / "old" / "fedsplit-0.0.1.dist-info" / "METADATA").write_text(facts)
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
        run.wait_for("round 1/2")
        assert {actor["node"] for actor in raylets.actors(WORKER)} == {old_node}
        assert run.end() == (0, ""), run.shown
    assert adapters(run.adapters) == alone("fedsa")[1]
