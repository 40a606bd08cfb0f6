"""Clients' data that no process sends: data on a shared disk, or on the node of a client pinned by a label.

Before a worker plays a client for the first time, the worker checks that the client's data equal the driver's data.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from uuid import uuid4

from fedsplit.corpora.partition import partition_of
from fedsplit.corpora.shards import shard_file, write_shard
from fedsplit.engines.client_files import Luggage, NodeDisk, Parcel, Shipment, Shipping, keep
from fedsplit.engines.worker_pool import Place
from fedsplit.errors import SettingError
from fedsplit.settings.config import Config
from fedsplit.settings.documents import as_document, from_document

CLIENTS = "fedsplit-clients"
"""Key of the label that says whose data a node has, such as fedsplit-clients=0-3_7."""

_MARK = "run"
"""File in a node's folder with the name of the run whose clients' state is there."""


class ForeignData(Exception):
    """A node has other data for a client than the driver, or none. The run cannot go on."""


def digest_of(path: Path) -> str:
    """Returns the SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Digests:
    """Digests of the clients' data in the run's folder, each computed once."""

    def __init__(self, root: Path) -> None:
        """Computes nothing yet.

        Args:
            root: Folder of the clients' disks.
        """
        self._of = functools.cache(lambda client: digest_of(shard_file(root, client)))

    def __getitem__(self, client: int) -> str:
        """Returns the digest of a client's data."""
        return self._of(client)


@functools.cache
def check_data(path: Path, client: int, digest: str) -> None:
    """Checks that a client's data equal the driver's data. Each process reads the data once.

    Args:
        path: File with the data, on this node.
        client: Number of the client.
        digest: Digest of the driver's data.

    Raises:
        ForeignData: The data differ, or cannot be read.
    """
    try:
        is_same = digest_of(path) == digest
    except OSError as error:
        raise ForeignData(f"{os.uname().nodename} cannot read {path}, the data of client {client}") from error
    if not is_same:
        raise ForeignData(f"on {os.uname().nodename}, the data of client {client} are not those of the driver")


class SharedFolder:
    """Carries nothing, since all nodes see the folder of the clients' disks; the carrier of `data.at` shared."""

    def __init__(self, root: Path) -> None:
        """Takes the folder of the clients' disks."""
        self.home: Mapping[int, str] = {}
        self.sent = 0
        self.received = 0
        self._digests = Digests(root)

    def pack(self, place: Place, client: int) -> Luggage:
        """Returns the digest of the client's data."""
        return CheckedData(self._digests[client])

    def unpack(self, place: Place, client: int, changes: Parcel) -> None:
        """Has nothing to take over."""

    def forget(self, place: Place) -> None:
        """Has nothing to forget."""


class CheckedData:
    """Digest of a client's data in a folder that the node must see; the luggage of `SharedFolder`."""

    def __init__(self, digest: str) -> None:
        """Takes the digest."""
        self._digest = digest

    def arrive(self, store: Path, client: int) -> Path:
        """Checks that the folder has the driver's data.

        Raises:
            ForeignData: The folder has different data, or none.
        """
        try:
            check_data(shard_file(store, client), client, self._digest)
        except ForeignData as error:
            raise ForeignData(f"data.at: {error}; shared needs one folder of --out that all nodes see") from None
        return store

    def leave(self) -> Parcel:
        """Returns no changes."""
        return Parcel()


def numbers_of(label: str) -> list[int]:
    """Returns the clients of a label's value. Ray allows no commas in it.

    Raises:
        ValueError: The value is none.

    Example:
        >>> numbers_of("0-2_7")
        [0, 1, 2, 7]
    """
    found: list[int] = []
    for piece in label.split("_"):
        first, _, last = piece.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def homes(
    labels: Mapping[str, Mapping[str, str]],
    clients: int,
) -> dict[int, str]:
    """Returns the node of each client.

    Args:
        labels: Labels by Ray's id of the node.
        clients: Number of clients.

    Raises:
        SettingError: A client has no node or several, or a label cannot be read.

    Example:
        >>> homes({"a1": {"fedsplit-clients": "0_2"}, "b2": {"fedsplit-clients": "1"}}, clients=3)
        {0: 'a1', 2: 'a1', 1: 'b2'}
    """
    found: dict[int, str] = {}
    for node, of_node in labels.items():
        value = of_node.get(CLIENTS, "")
        try:
            numbers = numbers_of(value) if value else []
        except ValueError:
            raise SettingError("data.at", "label", f"labels such as {CLIENTS}=0-3_7, and not {value}") from None
        for client in numbers:
            if client in found:
                raise SettingError("data.at", "label", f"one node for client {client}, and two have it in {CLIENTS}")
            found[client] = node
    missing = [client for client in range(clients) if client not in found]
    if missing:
        words = f"a node for each client, and none has client {missing[0]} in its label {CLIENTS}"
        raise SettingError("data.at", "label", words)
    return {client: node for client, node in found.items() if client < clients}  # labels may serve larger runs, too


def table(homes: Mapping[int, str], addresses: Mapping[str, str]) -> list[str]:
    r"""Returns the lines of a table with the clients of each node.

    Args:
        homes: Ray's id of the node, by client.
        addresses: Addresses by Ray's id of the node.

    Example:
        >>> print("\n".join(table({0: "a1", 2: "a1", 1: "b2"}, {"a1": "10.0.0.7", "b2": "10.0.0.8"})))
        node             clients whose data it has
        10.0.0.7         0, 2
        10.0.0.8         1
    """
    lines = [f"{'node':<16} clients whose data it has"]
    for node, address in addresses.items():
        clients = sorted(client for client, home in homes.items() if home == node)
        if clients:
            lines.append(f"{address:<16} {', '.join(map(str, clients))}")
    return lines


class PinnedClients(Shipping):
    """Leaves each client's data and state on the client's node; the carrier of `data.at` label.

    Changes of base weights are the server's, and travel as elsewhere.
    """

    def __init__(
        self,
        config: Config,
        root: Path,
        driver: str,
        home: Mapping[int, str],
    ) -> None:
        """Knows where each client is.

        Args:
            config: Settings of the run.
            root: Folder of the clients' disks in the run's folder, as an absolute path.
            driver: Ray's id of the node on which that folder is.
            home: Ray's id of the node, by client.
        """
        run = root.parent
        digest = hashlib.sha256(bytes(run)).hexdigest()  # as the file system has the path, which need not be UTF-8
        name = f"{run.name}-{digest[:8]}"  # by the path of the run, so that --resume finds the folders again
        run_of_state = "" if config.resume else str(uuid4())
        disk = PinnedDisk(Path(config.data.folder) / name, run_of_state)
        super().__init__(root, driver, disk, folds_alone=True)
        self._pinned = disk
        self.home = home
        self._settings = json.dumps(as_document(config))
        self._digests = Digests(root)

    def pack(self, place: Place, client: int) -> Luggage:
        """Returns the client's number, and the changes of base weights that the place lacks."""
        shipment = Shipment(self._pinned, self.to_node(place, client), folds_alone=True)
        here = sorted(other for other, node in self.home.items() if node == place.node)
        return PinnedData(self._pinned, self._settings, here, self._digests[client], shipment)


class PinnedDisk(NodeDisk):
    """A folder on a node. The folder stays after the run, since `--resume` needs the clients' state."""

    def __init__(self, folder: Path, run: str) -> None:
        """Names the folder.

        Args:
            folder: The folder; `~` is the home folder on each node.
            run: Name of a new run, which removes files of earlier runs; empty for a resumed run.
        """
        super().__init__(run)
        self._folder = folder

    @property
    def root(self) -> Path:
        """The folder, on the node where this is asked."""
        return self._folder.expanduser()

    @contextlib.contextmanager
    def opened(self) -> Iterator[Path]:
        """Makes the folder, and locks the folder for the other processes of the node during the context.

        The clients' data are deleted at the end of the last process of the node that used the folder.
        """
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = os.open(self.root, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            # The first process of a new run on the node removes the state of an earlier run with the same folder.
            mark = self.root / _MARK
            is_of_this_run = mark.exists() and mark.read_text() == self._run
            if self._run and not is_of_this_run:
                for path in self.root.iterdir():
                    is_folder = path.is_dir() and not path.is_symlink()  # a link is removed, not its target
                    if is_folder:
                        shutil.rmtree(path)
                    else:
                        path.unlink()
                mark.write_text(self._run)
            # The folder with the data alone. The clients' state must outlive the run.
            keep(shard_file(self.root, 0).parent)
            yield self.root
        finally:
            os.close(folder)  # frees the lock

    def receive(self, parcel: Parcel) -> None:
        """Writes the files of a parcel."""
        parcel.unpack(self.root)


class PinnedData:
    """Settings by which a node divides a local copy of the data set, and keeps the data of the node's clients."""

    def __init__(
        self,
        disk: PinnedDisk,
        settings: str,
        here: Sequence[int],
        digest: str,
        shipment: Shipment,
    ) -> None:
        """Carries numbers and settings, and no data of a client.

        Args:
            disk: Folder of the clients' disks on the node.
            settings: Settings of the run, as JSON.
            here: Clients of the node.
            digest: The driver's digest of the client's data.
            shipment: Changes of base weights.
        """
        self._disk = disk
        self._settings = settings
        self._here = here
        self._digest = digest
        self._shipment = shipment

    def arrive(self, store: Path, client: int) -> Path:
        """Makes the data of the node's clients, unless the data exist.

        Raises:
            ForeignData: For the client, the node's data set gives other data than the driver's.
            MissingFiles: Changes of base weights are missing.
        """
        path = shard_file(self._disk.root, client)
        with self._disk.opened() as root:
            # Dividing the data set gives the data of all clients at once. The lock lets one process of the node do so.
            if not path.exists():
                shards = partition_of(from_document(json.loads(self._settings))).shards
                for other in self._here:
                    write_shard(root, other, shards[other])
        try:
            check_data(path, client, self._digest)
        except ForeignData as error:
            raise ForeignData(f"data.at: {error}; every node needs the same --dataset") from None
        return self._shipment.arrive(store, client)

    def leave(self) -> Parcel:
        """Returns the changes of base weights that the client has written down."""
        return self._shipment.leave()
