"""Data that do not travel: the driver's to the byte, on the node that a label names, and gone with the run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from raylets import ROOT

from fedsplit.corpora.partition import shards_of
from fedsplit.corpora.shards import read_shard, shard_file, write_shard
from fedsplit.engines import client_data
from fedsplit.engines.client_data import CLIENTS, ForeignData, PinnedClients, SharedFolder, digest_of, homes, numbers_of
from fedsplit.engines.client_files import Parcel
from fedsplit.engines.worker_pool import Place
from fedsplit.errors import SettingError
from fedsplit.settings.config import Config
from fedsplit.settings.documents import build

NORTH, SOUTH = Place("north", 1), Place("south", 1)

HOMES = {0: "north", 1: "south", 2: "north"}


@pytest.fixture
def disks(tmp_path: Path) -> Path:
    """Folder of the clients' disks of a run whose data the driver has divided."""
    root = tmp_path / "run" / "clients"
    for client, shard in enumerate(shards_of(configured(tmp_path))):
        write_shard(root, client, shard)
    return root


@pytest.fixture(autouse=True)
def _no_keeper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is to be deleted at the end of this process, and no answer of an earlier test is known."""
    monkeypatch.setattr(client_data, "keep", lambda folder: folder.mkdir(exist_ok=True))
    client_data.check_data.cache_clear()
    yield


def configured(tmp_path: Path, **settings: object) -> Config:
    return build(
        {
            "clients": 3,
            "dataset": "synthetic",
            "train.max_length": 16,
            "data.at": "label",
            "data.folder": str(tmp_path / "node"),
            **settings,
        }
    )


def pinned(tmp_path: Path, disks: Path, **settings: object) -> PinnedClients:
    return PinnedClients(configured(tmp_path, **settings), disks, "north", HOMES)


def test_a_node_makes_the_data_of_its_own_clients_to_the_byte(tmp_path: Path, disks: Path) -> None:
    carrier = pinned(tmp_path, disks)
    root = carrier.pack(SOUTH, 1).arrive(disks, 1)
    assert root.is_relative_to(tmp_path / "node") and root != disks
    assert shard_file(root, 1).read_bytes() == shard_file(disks, 1).read_bytes()
    assert [path.name for path in shard_file(root, 1).parent.iterdir()] == ["0001.safetensors"]
    assert read_shard(root, 1).name == "owner 1"
    assert root.stat().st_mode & 0o777 == 0o700
    assert (carrier.sent, carrier.received) == (0, 0)


def test_what_a_client_keeps_stays_on_its_node_and_comes_back_with_resume(tmp_path: Path, disks: Path) -> None:
    carrier = pinned(tmp_path, disks)
    luggage = carrier.pack(SOUTH, 1)
    root = luggage.arrive(disks, 1)
    kept = root / "0001" / "round-0001.safetensors"
    kept.parent.mkdir()
    kept.write_bytes(b"moments")
    assert luggage.leave() == Parcel()
    assert carrier.pack(SOUTH, 1).arrive(disks, 1) == root and kept.exists()

    goes_on = pinned(tmp_path, disks, resume=str(disks.parent))
    assert goes_on.pack(SOUTH, 1).arrive(disks, 1) == root and kept.read_bytes() == b"moments"

    begins = pinned(tmp_path, disks)
    assert begins.pack(SOUTH, 1).arrive(disks, 1) == root
    assert not kept.exists(), "another run of the same folder begins without the state of the first one"


def test_changes_of_base_weights_travel(tmp_path: Path, disks: Path) -> None:
    carrier = pinned(tmp_path, disks)
    (disks / "folds").mkdir()
    (disks / "folds" / "round-0001.safetensors").write_bytes(b"change")
    luggage = carrier.pack(SOUTH, 1)
    root = luggage.arrive(disks, 1)
    assert (root / "folds" / "round-0001.safetensors").read_bytes() == b"change"
    (root / "folds" / "round-0002.safetensors").write_bytes(b"second")
    carrier.unpack(SOUTH, 1, luggage.leave())
    assert (disks / "folds" / "round-0002.safetensors").read_bytes() == b"second"
    assert (carrier.sent, carrier.received) == (6, 6)


def test_a_node_with_another_data_set_is_refused(tmp_path: Path, disks: Path) -> None:
    carrier = pinned(tmp_path, disks, seed=7)  # as if the node's file had other rows
    with pytest.raises(ForeignData, match="the data of client 1 are not those of the driver; every node needs"):
        carrier.pack(SOUTH, 1).arrive(disks, 1)


@pytest.mark.parametrize(("change", "words"), [("other", "are not those of the driver"), ("none", "cannot read")])
def test_a_shared_folder_must_have_the_drivers_data(change: str, words: str, tmp_path: Path, disks: Path) -> None:
    carrier = SharedFolder(disks)
    assert carrier.pack(SOUTH, 1).arrive(disks, 1) == disks
    seen = tmp_path / "another" / "clients"
    write_shard(seen, 1, shards_of(configured(tmp_path, seed=7))[1])
    if change == "none":
        shard_file(seen, 1).unlink()
    with pytest.raises(ForeignData, match=f"{words}.*; shared needs one folder of --out that all nodes see"):
        carrier.pack(SOUTH, 1).arrive(seen, 1)
    assert carrier.pack(SOUTH, 1).leave() == Parcel()


def test_data_are_read_for_their_digest_once(disks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(client_data, "digest_of", lambda path: read.append(path) or digest_of(path))
    carrier = SharedFolder(disks)
    for client in (0, 1, 0, 1):
        carrier.pack(SOUTH, client).arrive(disks, client)
    assert len(read) == 4, "each once by the driver, and once by the worker"


@pytest.mark.parametrize(
    ("label", "numbers"), [("0", [0]), ("0-3_7", [0, 1, 2, 3, 7]), ("12_3", [12, 3]), ("5-5", [5]), ("5-4", [])]
)
def test_a_label_names_clients(label: str, numbers: list[int]) -> None:
    assert numbers_of(label) == numbers


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["0-1", "x"], f"labels such as {CLIENTS}=0-3_7, and not x"),
        (["0-1", "1_2"], f"one node for client 1, and two have it in {CLIENTS}"),
        (["0", "2"], f"a node for each client, and none has client 1 in its label {CLIENTS}"),
        ([], f"a node for each client, and none has client 0 in its label {CLIENTS}"),
    ],
)
def test_a_client_without_one_node_is_named(labels: list[str], words: str) -> None:
    with pytest.raises(SettingError) as refused:
        homes({str(number): {CLIENTS: label} for number, label in enumerate(labels)}, clients=3)
    assert str(refused.value) == f"data.at: label is not possible; allowed: {words}"


def test_nodes_without_the_label_and_clients_beyond_the_run_are_no_matter() -> None:
    assert homes({"a": {"site": "x"}, "b": {CLIENTS: "0-9"}}, clients=2) == {0: "b", 1: "b"}


_PLAY = """
import sys
from pathlib import Path
from fedsplit.engines.client_data import PinnedDisk
from fedsplit.corpora.shards import shard_file
with PinnedDisk(Path(sys.argv[1]), "run").opened() as root:
    shard_file(root, 0).write_bytes(b"text")
    (root / "0000").mkdir()
print("ready", flush=True)
sys.stdin.read()
"""


def test_the_data_go_with_the_last_process_of_the_node_and_the_state_stays(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    call = [sys.executable, "-c", _PLAY, str(tmp_path / "node")]
    with subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        assert shard_file(tmp_path / "node", 0).read_bytes() == b"text"
        process.kill()
    until = time.monotonic() + 20
    data = shard_file(tmp_path / "node", 0).parent
    while data.exists() and time.monotonic() < until:
        time.sleep(0.02)
    assert not data.exists()
    assert (tmp_path / "node" / "0000").is_dir()
