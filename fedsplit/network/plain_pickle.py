"""Reads pickles of plain values, on request alone: dictionaries, lists, tuples, texts, numbers, true, false and none.

FedScale ships its traces as pickles. A pickle is a program that may call any function by its name. The reader here
knows no name, so that a pickle can make plain values only. A pickle that names anything is refused.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import NoReturn

from fedsplit.errors import InputError, shortened

LARGEST = 2**28
"""Most bytes of a file. FedScale's larger trace has about 50 MB."""


class _PlainValues(pickle.Unpickler):
    """Reader of a pickle that refuses every name."""

    def find_class(self, module: str, name: str) -> NoReturn:
        """Refuses a class or a function by its name.

        Raises:
            InputError: Always.
        """
        raise InputError(f"it names {shortened(f'{module}.{name}')}; only plain values are read")

    def persistent_load(self, pid: object) -> NoReturn:
        """Refuses an object that lies outside of the file.

        Raises:
            InputError: Always.
        """
        raise InputError("it refers to an object outside of the file; only plain values are read")


def read_plain(path: Path) -> object:
    """Reads a pickle of plain values.

    Args:
        path: The file.

    Raises:
        InputError: The file cannot be read, is too large, is no pickle, or has anything but plain values.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "trace"
        ...     _ = file.write_bytes(pickle.dumps({1: [2.5, "a"]}))
        ...     read_plain(file)
        {1: [2.5, 'a']}
    """
    try:
        # Before reading: a huge file would fill the memory.
        if path.stat().st_size > LARGEST:
            raise InputError(f"{shortened(path)} has more than {LARGEST // 2**20} MiB, too many for a trace")
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{shortened(path)} cannot be read: {error.strerror}") from None
    try:
        return _PlainValues(io.BytesIO(content)).load()
    except InputError as error:
        raise InputError(f"{shortened(path)} is refused: {error}") from None
    except Exception as error:  # noqa: BLE001  # a broken pickle may raise any error
        raise InputError(f"{shortened(path)} is no pickle: {type(error).__name__}") from None
