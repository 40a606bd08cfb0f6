"""The lock of a run's folder: one process at a time works in it."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path
from typing import IO

from fedsplit.durable import open_here
from fedsplit.errors import SettingError


def lock(run: Path, setting: str = "resume") -> IO[bytes]:
    """Keeps other processes out of a run's folder until this one ends. The system frees the lock however it ends.

    Args:
        run: The run's folder, with its folder of checkpoints.
        setting: Name of the setting or argument that gave the folder, for the message.

    Returns:
        The open file that holds the lock. Closing it frees the lock.

    Raises:
        SettingError: Another process is at work in the folder, or a folder in it is a symbolic link, so that files
            elsewhere would be written or removed.
        OSError: The lock's file cannot be opened.
    """
    folders = [path for path in run.glob("[!.]*") if path.is_dir()]  # drafts are removed without what they point to
    linked = sorted(path.name for path in folders if path.is_symlink())
    if linked:
        raise SettingError(setting, f"{run} ({linked[0]} is a symbolic link)", "a run whose folders are all its own")
    file = open(run / "checkpoints" / ".lock", "wb", opener=open_here)  # noqa: SIM115  # open for as long as the run lasts
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        # POSIX allows both errors for a lock that another process holds.
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise SettingError(setting, str(run), "the folder of a run that is not at work any more") from None
        raise
    return file
