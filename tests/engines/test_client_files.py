"""Files of clients between the run's folder and the nodes: each travels when it must, and leads nowhere else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from raylets import ROOT

from fedsplit.engines import client_files
from fedsplit.engines.client_files import MissingFiles, NodeDisk, Parcel, Shipment, Shipping, stamps
from fedsplit.engines.worker_pool import Place

DATA = "data/0003.safetensors"
STATE = "0003/round-0001.safetensors"
FOLD = "folds/round-0001.safetensors"

DRIVER = "driver"
"""The node of the run's folder."""

HERE, SIBLING, ELSEWHERE = Place("north", 1), Place("north", 2), Place("south", 1)
"""Two processes of one node, and one of another node."""


def write(root: Path, name: str, content: bytes) -> None:
    """Writes a file whose stamp no earlier content had."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def sent(shipping: Shipping, place: Place, client: int) -> Parcel:
    """Returns what travels to a place, without the sizes of all that must be there then."""
    return replace(shipping.to_node(place, client), sizes={})


@pytest.fixture
def disks(tmp_path: Path) -> Path:
    """Folder of a run's clients, with the files of client 3, and one of another client."""
    root = tmp_path / "clients"
    for name, content in ((DATA, b"text"), (STATE, b"moments"), (FOLD, b"change"), ("data/0004.safetensors", b"other")):
        write(root, name, content)
    return root


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node's folder for temporary files; nothing is to be deleted at the end of this process."""
    made = tmp_path / "temporary"
    made.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(made))
    return made


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "0003/../../x", "..", ""])
def test_a_path_that_leads_out_is_refused(name: str, tmp_path: Path) -> None:
    for parcel in (Parcel({name: b"x"}), Parcel(gone=(name,))):
        with pytest.raises(ValueError, match="is no path of a client's file"):
            parcel.unpack(tmp_path / "clients")
    assert list(tmp_path.iterdir()) == []


def test_one_bad_path_keeps_the_good_ones_out_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        Parcel({STATE: b"good", "../x": b"bad"}).unpack(tmp_path)
    assert not (tmp_path / STATE).exists()


def test_a_parcel_writes_and_deletes(disks: Path) -> None:
    parcel = Parcel({STATE: b"new", "0005/round-0001.safetensors": b"first"}, gone=(FOLD, "0009/missing.safetensors"))
    parcel.unpack(disks)
    assert parcel.nbytes == 8
    assert (disks / STATE).read_bytes() == b"new"
    assert (disks / "0005/round-0001.safetensors").read_bytes() == b"first"
    assert not (disks / FOLD).exists()


def test_the_stamps_are_of_the_client_and_of_the_folds(disks: Path) -> None:
    assert set(stamps(disks, 3)) == {DATA, STATE, FOLD}
    assert set(stamps(disks, 4)) == {"data/0004.safetensors", FOLD}


def test_a_file_travels_once(disks: Path) -> None:
    shipping = Shipping(disks, DRIVER)
    first = sent(shipping, HERE, 3)
    assert first == Parcel({DATA: b"text", STATE: b"moments", FOLD: b"change"})
    assert shipping.sent == first.nbytes
    assert sent(shipping, HERE, 3) == Parcel()
    assert sent(shipping, ELSEWHERE, 3).files == first.files


def test_a_changed_file_travels_again_and_a_deleted_one_is_reported_once(disks: Path) -> None:
    shipping = Shipping(disks, DRIVER)
    sent(shipping, HERE, 3)
    write(disks, STATE, b"later moments")
    (disks / FOLD).unlink()
    assert sent(shipping, HERE, 3) == Parcel({STATE: b"later moments"}, gone=(FOLD,))
    assert sent(shipping, HERE, 3) == Parcel()


def test_a_file_of_the_same_size_travels_again(disks: Path) -> None:
    shipping = Shipping(disks, DRIVER)
    sent(shipping, HERE, 3)
    before = (disks / STATE).stat().st_mtime_ns
    write(disks, STATE, b"stnemom")
    os.utime(disks / STATE, ns=(before + 1, before + 1))
    assert sent(shipping, HERE, 3).files == {STATE: b"stnemom"}


def test_folds_are_known_by_process_and_the_rest_by_node(disks: Path) -> None:
    shipping = Shipping(disks, DRIVER)
    sent(shipping, HERE, 3)
    assert sent(shipping, SIBLING, 3).files == {FOLD: b"change"}
    assert sent(shipping, HERE, 4).files == {"data/0004.safetensors": b"other"}


def test_after_a_death_all_of_the_node_travels_again(disks: Path) -> None:
    shipping = Shipping(disks, DRIVER)
    everything = sent(shipping, HERE, 3)
    sent(shipping, ELSEWHERE, 3)
    shipping.forget(HERE)
    assert sent(shipping, HERE, 3) == everything
    assert sent(shipping, ELSEWHERE, 3) == Parcel()


def test_changes_are_taken_over_and_do_not_travel_back(disks: Path) -> None:
    shipping = Shipping(disks, DRIVER)
    sent(shipping, HERE, 3)
    parcel = Parcel({"0003/round-0002.safetensors": b"second"}, gone=(STATE,))
    shipping.unpack(HERE, 3, parcel)
    assert (disks / "0003/round-0002.safetensors").read_bytes() == b"second"
    assert not (disks / STATE).exists()
    assert shipping.received == 6
    assert sent(shipping, HERE, 3) == Parcel()
    assert sent(shipping, ELSEWHERE, 3).files == {
        DATA: b"text",
        "0003/round-0002.safetensors": b"second",
        FOLD: b"change",
    }


@pytest.mark.parametrize(
    "parcel",
    [
        Parcel({"0004/round-0001.safetensors": b"x"}),
        Parcel({"data/0004.safetensors": b"x"}),
        Parcel(gone=("data/0004.safetensors",)),
        Parcel({"0003x/round-0001.safetensors": b"x"}),
    ],
)
def test_a_client_changes_no_file_of_another(parcel: Parcel, disks: Path) -> None:
    before = stamps(disks, 4)
    with pytest.raises(ValueError, match="which is not a file of its own"):
        Shipping(disks, DRIVER).unpack(HERE, 3, parcel)
    assert stamps(disks, 4) == before
    assert not (disks / "0004").exists() and not (disks / "0003x").exists()


def test_a_client_reaches_no_other_through_its_own_folder(disks: Path) -> None:
    with pytest.raises(ValueError, match="is no path"):
        Shipping(disks, DRIVER).unpack(HERE, 3, Parcel({"0003/../data/0004.safetensors": b"x"}))
    assert (disks / "data/0004.safetensors").read_bytes() == b"other"


def test_nothing_travels_to_the_node_of_the_run_s_folder(disks: Path) -> None:
    shipping = Shipping(disks, DRIVER)
    assert shipping.pack(Place(DRIVER, 7), 3) is None and shipping.sent == 0
    assert isinstance(shipping.pack(HERE, 3), Shipment) and shipping.sent == 17


def test_data_and_state_may_stay_where_they_are(disks: Path) -> None:
    shipping = Shipping(disks, DRIVER, folds_alone=True)
    assert shipping.to_node(HERE, 3) == Parcel({FOLD: b"change"}, sizes={FOLD: 6})
    with pytest.raises(ValueError, match="which is not a file of its own"):
        shipping.unpack(HERE, 3, Parcel({STATE: b"secret"}))
    assert (disks / STATE).read_bytes() == b"moments"


def test_a_shipment_brings_files_and_takes_the_changes_back(disks: Path, temporary: Path) -> None:
    shipping = Shipping(disks, DRIVER, NodeDisk("run"))
    luggage = shipping.pack(HERE, 3)
    assert luggage is not None
    root = luggage.arrive(Path("as the driver names it"), 3)
    assert (root / STATE).read_bytes() == b"moments"
    write(root, "0003/round-0002.safetensors", b"second")
    assert luggage.leave() == Parcel({"0003/round-0002.safetensors": b"second"})


@pytest.mark.parametrize("name", [DATA, STATE, FOLD])
def test_files_that_the_driver_counts_on_and_that_are_gone_are_missed(name: str, disks: Path, temporary: Path) -> None:
    """As where the only process with files died, and the folder was deleted before the driver heard of it."""
    shipping = Shipping(disks, DRIVER, NodeDisk("run"))
    root = shipping.pack(HERE, 3).arrive(disks, 3)  # type: ignore[union-attr]
    (root / name).unlink()
    with pytest.raises(MissingFiles, match=f"{name} is not on the node any more"):
        shipping.pack(HERE, 3).arrive(disks, 3)  # type: ignore[union-attr]
    shipping.forget(HERE)
    shipping.pack(HERE, 3).arrive(disks, 3)  # type: ignore[union-attr]
    assert (root / name).read_bytes() == (disks / name).read_bytes()


def test_a_disk_tells_what_has_changed(temporary: Path) -> None:
    disk = NodeDisk("run")
    disk.receive(Parcel({DATA: b"text", STATE: b"moments"}))
    assert disk.root.is_relative_to(temporary)
    assert disk.root.stat().st_mode & 0o777 == disk.root.parent.stat().st_mode & 0o777 == 0o700
    before = stamps(disk.root, 3)
    assert disk.changes(before, 3) == Parcel()
    write(disk.root, "0003/round-0002.safetensors", b"second")
    (disk.root / STATE).unlink()
    assert disk.changes(before, 3) == Parcel({"0003/round-0002.safetensors": b"second"}, gone=(STATE,))


def test_a_folder_of_somebody_else_is_not_used(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: stranger)
    disk = NodeDisk("run")
    disk.root.parent.mkdir()  # with the id of this user, who is somebody else now
    with pytest.raises(PermissionError, match="belongs to somebody else"):
        disk.receive(Parcel({DATA: b"text"}))
    assert list(disk.root.parent.iterdir()) == []


@pytest.mark.parametrize("is_there", [True, False])
def test_a_symbolic_link_is_not_followed(is_there: bool, temporary: Path, tmp_path: Path) -> None:
    disk = NodeDisk("run")
    target = tmp_path / "target"
    if is_there:
        target.mkdir()
    disk.root.parent.symlink_to(target)
    with pytest.raises(PermissionError, match="belongs to somebody else"):
        disk.receive(Parcel({DATA: b"text"}))
    assert not is_there or list(target.iterdir()) == []


_RECEIVE = """
import sys, tempfile
from fedsplit.engines.client_files import NodeDisk, Parcel
disk = NodeDisk("run")
disk.receive(Parcel({sys.argv[1]: b"text"}))
print(disk.root, flush=True)
sys.stdin.read()
"""


def receiving(temporary: Path, name: str) -> tuple[subprocess.Popen[str], Path]:
    """Starts a process that receives a file; returns the process once the file is there, and the node's folder."""
    env = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", _RECEIVE, name], text=True, env=env, **pipes)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def is_gone(folder: Path) -> bool:
    """Returns whether a folder disappears within a few seconds."""
    until = time.monotonic() + 20
    while folder.exists() and time.monotonic() < until:
        time.sleep(0.02)
    return not folder.exists()


def test_the_last_process_of_a_node_leaves_nothing_however_it_ends(temporary: Path) -> None:
    first, root = receiving(temporary, DATA)
    second, _ = receiving(temporary, STATE)
    with first, second:
        first.send_signal(signal.SIGKILL)
        first.wait()
        time.sleep(0.5)  # the files must stay: another process plays here
        assert (root / DATA).read_bytes() == b"text"
        second.send_signal(signal.SIGKILL)
    assert is_gone(root)


def test_a_folder_that_was_deleted_a_moment_ago_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "run"
    deleted = []

    def lock(descriptor: int, how: int) -> None:
        if not deleted:
            deleted.append(root)
            root.rmdir()

    monkeypatch.setattr(client_files.fcntl, "flock", lock)
    client_files._lock(root)
    assert root.is_dir()
