"""Clients' files on the way to the nodes of a cluster and back: data, state between rounds, folded changes.

The run's folder has all files. A node has copies of the files for its clients. A missing or outdated copy is sent.
(Under `data.at` label and shared, clients' data do not travel: `fedsplit.engines.client_data`.)
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Protocol
from uuid import uuid4

from fedsplit.corpora.shards import shard_file
from fedsplit.durable import replacing
from fedsplit.engines.worker_pool import Place
from fedsplit.state.client_store import ClientStore
from fedsplit.state.fold_log import FOLDS

_KEEPER = """
import fcntl, os, shutil, sys
if os.fork():
    os._exit(0)
sys.stdin.buffer.read()
try:
    folder = os.open(sys.argv[1], os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    is_there = os.path.samestat(os.fstat(folder), os.stat(sys.argv[1]))
except FileNotFoundError:
    sys.exit()
if is_there:
    shutil.rmtree(sys.argv[1], ignore_errors=True)
"""
"""Program that deletes a node's folder as soon as no process of the run is left there.

The end of the standard input is the end of the process that has started the program, however the process ends. The
program goes on in a child, since Ray kills the children of a process that it ends, but not theirs. A process that is
ending may still have its lock, so that the program waits for the lock. A folder that was made again in the meantime
belongs to other processes, which have programs of their own.
"""

Stamp = tuple[int, int]
"""Time of the last change in nanoseconds, and size in bytes: a file whose stamp is as it was has not changed."""


class MissingFiles(Exception):
    """A node lacks files that the driver sent before. The driver sends the files again."""


@dataclass(frozen=True)
class Parcel:
    """Files that travel between the run's folder and a node.

    Attributes:
        files: Contents by path, relative to the folder of the clients' disks.
        gone: Paths of deleted files.
        sizes: Bytes of all files at the node after the arrival of the parcel, by path.
    """

    files: Mapping[str, bytes] = field(default_factory=dict)
    gone: tuple[str, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all contents."""
        return sum(map(len, self.files.values()))

    def unpack(self, root: Path) -> None:
        """Writes the files into a folder, each whole or not at all, and deletes those that are gone.

        Raises:
            ValueError: A path leads out of the folder.
            NotWritten: A file could not be written.
        """
        # All names before the first file: a parcel that is refused has written nothing.
        for name in (*self.files, *self.gone):
            if not is_inside(name):
                raise ValueError(f"{name} is no path of a client's file")
        for name, content in self.files.items():
            (root / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with replacing(root / name) as draft:
                draft.write_bytes(content)
        for name in self.gone:
            with contextlib.suppress(FileNotFoundError):
                (root / name).unlink()


def is_inside(name: str) -> bool:
    """Returns whether a relative path stays in its folder.

    Example:
        >>> is_inside("0003/round-0001.safetensors"), is_inside("../x"), is_inside("/etc/passwd")
        (True, False, False)
    """
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def stamps(root: Path, client: int, folds_alone: bool = False) -> dict[str, Stamp]:
    """Returns the stamps of the files that a client needs, by path relative to the folder of the clients' disks.

    Args:
        root: Folder of the clients' disks.
        client: Number of the client.
        folds_alone: True to leave out the client's data and state.
    """
    paths = list((root / FOLDS).glob("*.safetensors"))
    if not folds_alone:
        paths += [shard_file(root, client), *ClientStore(root, client).folder.glob("*.safetensors")]
    found = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # deleted by another process a moment ago
            facts = path.stat()
            found[path.relative_to(root).as_posix()] = (facts.st_mtime_ns, facts.st_size)
    return found


class Luggage(Protocol):
    """Files that accompany a request. The methods are called in the client's process."""

    def arrive(self, store: Path, client: int) -> Path:
        """Makes a client's files available.

        Args:
            store: Folder of the clients' disks on the driver's node.
            client: Number of the client.

        Returns:
            Folder of the clients' disks on this node.
        """
        ...

    def leave(self) -> Parcel:
        """Returns the changes that must travel back, after the request has been carried out."""
        ...


class Carrier(Protocol):
    """The driver's side: makes a client's files available on the node that plays the client.

    Attributes:
        home: Ray's id of the only node that may play a client, by client. Any node may play clients without an entry.
        sent: Bytes of clients' files sent to nodes.
        received: Bytes of clients' files received from nodes.
    """

    home: Mapping[int, str]
    sent: int
    received: int

    def pack(self, place: Place, client: int) -> Luggage | None:
        """Returns what a place lacks for a request to a client; None if nothing."""
        ...

    def unpack(self, place: Place, client: int, changes: Parcel) -> None:
        """Takes over the changes of a client's files from a node.

        Raises:
            ValueError: A file is not the client's.
            NotWritten: A file could not be written.
        """
        ...

    def forget(self, place: Place) -> None:
        """Forgets the files at a place, since a process there has died and may have left damaged files."""
        ...


class Shipping:
    """Sends files to nodes, and records the files on each node."""

    def __init__(
        self,
        root: Path,
        driver: str,
        disk: NodeDisk | None = None,
        folds_alone: bool = False,
    ) -> None:
        """Starts without a node.

        Args:
            root: Folder of the clients' disks in the run's folder.
            driver: Ray's id of the node with `root`. No file is sent to this node.
            disk: Folder on the nodes; None for a temporary folder.
            folds_alone: True if clients' data and state are not sent.
        """
        self.home: Mapping[int, str] = {}
        self.sent = 0
        self.received = 0
        self._disk = disk or NodeDisk(str(uuid4()))
        self._root = root
        self._driver = driver
        self._folds_alone = folds_alone
        self._there: dict[str, dict[str, Stamp]] = {}  # stamps in the run's folder of the copies, by place
        self._guard = threading.Lock()

    def pack(self, place: Place, client: int) -> Luggage | None:
        """Returns the files that a place lacks; None on the node of the driver."""
        if place.node == self._driver:
            return None
        return Shipment(self._disk, self.to_node(place, client), self._folds_alone)

    def to_node(self, place: Place, client: int) -> Parcel:
        """Returns the files of a client that a place lacks. From now on the place counts as having the files.

        Args:
            place: Process that will play the client.
            client: Number of the client.
        """
        # Stamps before contents: a file that changes in between is sent again next time.
        now = stamps(self._root, client, self._folds_alone)
        files: dict[str, bytes] = {}
        gone: list[str] = []
        with self._guard:
            for name in {*now, *self._known(place, client)}:
                there = self._copies(place, name)
                if name not in now:
                    gone.append(name)
                    del there[name]
                elif there.get(name) != now[name]:
                    files[name] = (self._root / name).read_bytes()
                    there[name] = now[name]
            sizes = {name: size for name, (_, size) in now.items()}
            parcel = Parcel(files, tuple(gone), sizes)
            self.sent += parcel.nbytes
        return parcel

    def unpack(self, place: Place, client: int, changes: Parcel) -> None:
        """Takes over the changes of a client's files from a node.

        Args:
            place: Process that has played the client.
            client: Number of the client.
            changes: The changes.

        Raises:
            ValueError: A file is not the client's.
            NotWritten: A file could not be written.
        """
        of_client = self._prefixes(client)
        for name in (*changes.files, *changes.gone):
            if not name.startswith(of_client):
                raise ValueError(f"client {client} has sent {name}, which is not a file of its own")
        with self._guard:  # two clients may have written the same folded changes
            changes.unpack(self._root)
            now = stamps(self._root, client, self._folds_alone)
            for name in changes.files.keys() & now.keys():
                self._copies(place, name)[name] = now[name]
            for name in changes.gone:
                self._copies(place, name).pop(name, None)
            self.received += changes.nbytes

    def forget(self, place: Place) -> None:
        """Forgets the files at a place, since a process there has died and may have left damaged files."""
        with self._guard:
            self._there.pop(place.node, None)
            self._there.pop(f"{place.node}/{place.pid}", None)

    def _copies(self, place: Place, name: str) -> dict[str, Stamp]:
        """Returns the record of copies at a place that holds the stamp of a file.

        A client's files are recorded by node. The folded changes are recorded by process: all clients of a node read
        the changes, and a process must not rely on a file that was sent to a second process a moment ago.
        """
        key = f"{place.node}/{place.pid}" if name.startswith(f"{FOLDS}/") else place.node
        return self._there.setdefault(key, {})

    def _known(self, place: Place, client: int) -> list[str]:
        """Returns the names of the files of a client that a place has."""
        prefixes = self._prefixes(client)
        copies = (self._copies(place, name) for name in ("", f"{FOLDS}/"))
        return [name for there in copies for name in there if name.startswith(prefixes)]

    def _prefixes(self, client: int) -> tuple[str, ...]:
        if self._folds_alone:
            return (f"{FOLDS}/",)
        folder = ClientStore(self._root, client).folder.name
        return (f"{folder}/", f"{FOLDS}/", shard_file(Path(), client).as_posix())


class Shipment:
    """Files sent with a request, and changed files sent back; the luggage of `Shipping`."""

    def __init__(self, disk: NodeDisk, parcel: Parcel, folds_alone: bool) -> None:
        """Carries a parcel to the disk of a node."""
        self._disk = disk
        self._parcel = parcel
        self._folds_alone = folds_alone
        self._client = 0
        self._before: dict[str, Stamp] = {}

    def arrive(self, store: Path, client: int) -> Path:
        """Writes the files.

        Raises:
            MissingFiles: Files that were sent to the node before are not there any more.
            PermissionError, ValueError, NotWritten: As from `NodeDisk.receive`.
        """
        self._disk.receive(self._parcel)
        self._client = client
        self._before = stamps(self._disk.root, client, self._folds_alone)
        for name, size in self._parcel.sizes.items():
            if name not in self._before or self._before[name][1] != size:
                raise MissingFiles(f"{name} is not on the node any more")
        return self._disk.root

    def leave(self) -> Parcel:
        """Returns the changes since the files were written."""
        return self._disk.changes(self._before, self._client, self._folds_alone)


class NodeDisk:
    """A node's side: a folder with clients' files, which only the user of the process can read.

    The folder is deleted at the end of the last process that received files in it.
    """

    def __init__(self, run: str) -> None:
        """Names the folder, which all processes of a node share.

        Args:
            run: Name of the run.
        """
        self._run = run

    @property
    def root(self) -> Path:
        """The folder, on the node where this is asked."""
        return Path(tempfile.gettempdir()) / f"fedsplit-{os.getuid()}" / self._run

    def receive(self, parcel: Parcel) -> None:
        """Writes the files of a parcel.

        Raises:
            PermissionError: The folder for temporary files has a folder of this name that belongs to somebody else.
            ValueError: A path leads out of the folder.
            NotWritten: A file could not be written.
        """
        keep(self.root)
        parcel.unpack(self.root)

    def changes(self, before: Mapping[str, Stamp], client: int, folds_alone: bool = False) -> Parcel:
        """Returns the changes since the stamps were taken."""
        now = stamps(self.root, client, folds_alone)
        files = {}
        for name, stamp in now.items():
            if before.get(name) != stamp:
                files[name] = (self.root / name).read_bytes()
        gone = tuple(name for name in before if name not in now)
        return Parcel(files, gone)


@functools.cache
def keep(root: Path) -> int:
    """Makes a folder on a node. The folder is deleted at the end of the last process that made it.

    A separate process deletes the folder, since the calling process may be killed.

    Returns:
        Descriptor of a pipe to the second process, which waits until the pipe is closed.

    Raises:
        PermissionError: The parent of the folder belongs to somebody else.
    """
    with contextlib.suppress(FileExistsError):
        root.parent.mkdir(mode=0o700)
    if root.parent.is_symlink() or root.parent.stat().st_uid != os.getuid():
        raise PermissionError(f"{root.parent} belongs to somebody else")
    # A process of its own session is not ended by signals to this one's. It is there before the folder is, since this
    # process may end at any moment.
    call = [sys.executable, "-I", "-S", "-c", _KEEPER, str(root)]  # -I and -S: starts at once, whatever is installed
    end, open_end = os.pipe()
    try:
        subprocess.run(call, stdin=end, start_new_session=True, check=True)
    finally:
        os.close(end)
    _lock(root)
    return open_end


def _lock(root: Path) -> None:
    """Makes a folder, and locks the folder until the end of the process. No other process deletes a locked folder."""
    while True:
        root.mkdir(mode=0o700, exist_ok=True)
        lock = os.open(root, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_SH)
        with contextlib.suppress(FileNotFoundError):  # the process that deletes the folder was a moment faster
            if os.path.samestat(os.fstat(lock), root.stat()):
                return
        os.close(lock)
