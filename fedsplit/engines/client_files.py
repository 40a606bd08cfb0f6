"""Files of clients on their way to the nodes of a cluster, and back: data, state between rounds, folded changes.

The run's folder has them all. A node has a copy of what its clients need, which travels where the copy is not there or
is older.
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


@dataclass(frozen=True)
class Parcel:
    """Files that travel between the run's folder and a node.

    Attributes:
        files: Contents by path, relative to the folder of the clients' disks.
        gone: Paths of files that are there no more.
    """

    files: Mapping[str, bytes] = field(default_factory=dict)
    gone: tuple[str, ...] = ()

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


def stamps(root: Path, client: int) -> dict[str, Stamp]:
    """Returns the stamps of the files that a client needs, by path relative to the folder of the clients' disks."""
    folders = [ClientStore(root, client).folder, root / FOLDS]
    paths = [shard_file(root, client), *(path for folder in folders for path in folder.glob("*.safetensors"))]
    found = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # deleted by another process a moment ago
            facts = path.stat()
            found[path.relative_to(root).as_posix()] = (facts.st_mtime_ns, facts.st_size)
    return found


class Shipping:
    """The driver's side: knows what each node has.

    Attributes:
        disk: Folder of the run on each node.
        sent: Bytes that have travelled to nodes.
        received: Bytes that have come back.
    """

    def __init__(self, root: Path) -> None:
        """Knows of no node yet.

        Args:
            root: Folder of the clients' disks in the run's folder.
        """
        self.disk = NodeDisk(str(uuid4()))
        self._root = root
        self._there: dict[str, dict[str, Stamp]] = {}  # stamps in the run's folder of the copies, by place
        self._guard = threading.Lock()
        self.sent = self.received = 0

    def to_node(self, place: Place, client: int) -> Parcel:
        """Returns what a place lacks of a client's files; the place counts as having them from now on.

        Args:
            place: Process that will play the client.
            client: Number of the client.
        """
        now = stamps(self._root, client)
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
        parcel = Parcel(files, tuple(gone))
        self.sent += parcel.nbytes
        return parcel

    def from_node(self, place: Place, client: int, parcel: Parcel) -> None:
        """Takes over what a client has changed where it was played.

        Args:
            place: Process that has played the client.
            client: Number of the client.
            parcel: The changes.

        Raises:
            ValueError: A file is not the client's.
            NotWritten: A file could not be written.
        """
        strange = [name for name in (*parcel.files, *parcel.gone) if not name.startswith(self._prefixes(client))]
        if strange:
            raise ValueError(f"client {client} has sent {strange[0]}, which is not a file of its own")
        with self._guard:  # two clients may have written the same folded changes
            parcel.unpack(self._root)
            now = stamps(self._root, client)
            for name in parcel.files.keys() & now.keys():
                self._copies(place, name)[name] = now[name]
            for name in parcel.gone:
                self._copies(place, name).pop(name, None)
        self.received += parcel.nbytes

    def forget(self, place: Place) -> None:
        """Forgets what a place has: a process there has died, and may have left anything."""
        with self._guard:
            self._there.pop(place.node, None)
            self._there.pop(f"{place.node}/{place.pid}", None)

    def _copies(self, place: Place, name: str) -> dict[str, Stamp]:
        """Returns the stamps of a place's copies, among which a file is or would be.

        A client's own files are known by node. The folded changes are known by process: all clients of a node read
        them, and a process must not count on a file that was sent to another one a moment ago.
        """
        key = f"{place.node}/{place.pid}" if name.startswith(f"{FOLDS}/") else place.node
        return self._there.setdefault(key, {})

    def _known(self, place: Place, client: int) -> list[str]:
        """Returns the names of the files of a client that a place has."""
        prefixes = self._prefixes(client)
        copies = (self._copies(place, name) for name in ("", f"{FOLDS}/"))
        return [name for there in copies for name in there if name.startswith(prefixes)]

    def _prefixes(self, client: int) -> tuple[str, ...]:
        folder = ClientStore(self._root, client).folder.name
        return (f"{folder}/", f"{FOLDS}/", shard_file(Path(), client).as_posix())


class NodeDisk:
    """A node's side: a folder with the files of the clients that the node has played, for its user alone.

    The folder is deleted with the end of the last process that has received files there.
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
        _keep(self.root)
        parcel.unpack(self.root)

    def changes(self, before: Mapping[str, Stamp], client: int) -> Parcel:
        """Returns what has changed since the stamps were taken."""
        now = stamps(self.root, client)
        files = {name: (self.root / name).read_bytes() for name, stamp in now.items() if before.get(name) != stamp}
        return Parcel(files, tuple(name for name in before if name not in now))


@functools.cache
def _keep(root: Path) -> int:
    """Makes a node's folder, and has it deleted when no process is left that has called this.

    A second process deletes the folder, since this one may be killed.

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
    call = [sys.executable, "-I", "-S", "-c", _KEEPER, str(root)]
    end, open_end = os.pipe()
    try:
        subprocess.run(call, stdin=end, start_new_session=True, check=True)
    finally:
        os.close(end)
    _lock(root)
    return open_end


def _lock(root: Path) -> None:
    """Makes a folder, and locks it until this process ends, so that no other process deletes it."""
    while True:
        root.mkdir(mode=0o700, exist_ok=True)
        lock = os.open(root, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_SH)
        with contextlib.suppress(FileNotFoundError):  # the process that deletes the folder was a moment faster
            if os.path.samestat(os.fstat(lock), root.stat()):
                return
        os.close(lock)
