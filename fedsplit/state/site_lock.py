"""Lock of a site's folder: one client at a time, and a trace of a client that was killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from fedsplit.durable import writing
from fedsplit.errors import SettingError

_NAME = "lock"


class SiteLock:
    """A site's folder, kept to one client.

    The file of the lock holds a process number while a client works. A client that ends in good order empties the file.

    Attributes:
        descriptor: Open file of the lock. A child process that inherits the descriptor keeps the lock, too.
        was_killed: True if the client before did not end in good order.
    """

    def __init__(self, descriptor: int, was_killed: bool) -> None:
        self.descriptor = descriptor
        self.was_killed = was_killed

    def end_well(self) -> None:
        """Notes that the client ends in good order."""
        os.ftruncate(self.descriptor, 0)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[SiteLock]:
    """Makes a site's folder, and keeps other clients out of the folder until the context ends.

    Args:
        folder: Folder of the site.

    Raises:
        SettingError: Another client works in the folder.
        NotWritten: The folder cannot be made.

    Example:
        >>> import tempfile
        >>> with locked(Path(tempfile.mkdtemp())) as lock:
        ...     lock.was_killed
        False
    """
    with writing(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Apart from `open`, whose "r+" makes no file. "w+" would empty the file before the lock is held.
        (folder / _NAME).touch(0o600)
    with open(folder / _NAME, "r+", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = file.read().strip()
            allowed = f"a folder in which no other client is at work; process {holder} or its SuperNode is"
            raise SettingError("folder", folder, allowed) from None
        # Read under the lock, and before the file is emptied: a number that is still there is that of a killed
        # client.
        lock = SiteLock(file.fileno(), was_killed=bool(file.read()))
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()}\n")
        # A client that is killed a moment later must have left its number.
        file.flush()
        yield lock
