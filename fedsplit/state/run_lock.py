"""The lock of a run's folder: one process at a time works in it."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path
from typing import IO

from fedsplit.errors import SettingError


def lock(run: Path, setting: str = "resume") -> IO[bytes]:
    """Keeps other processes out of a run's folder until this one ends. The system frees the lock however it ends.

    Args:
        run: The run's folder, with its folder of checkpoints.
        setting: Name of the setting or argument that gave the folder, for the message.

    Returns:
        The open file that holds the lock. Closing it frees the lock.

    Raises:
        SettingError: Another process is at work in the folder.
        OSError: The lock's file cannot be opened.
    """
    file = open(run / "checkpoints" / ".lock", "wb")  # noqa: SIM115  # open for as long as the run lasts
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise SettingError(setting, str(run), "the folder of a run that is not at work any more") from None
        raise
    return file
