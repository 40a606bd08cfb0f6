"""Files with the token of a trunk's server: who can read the file may use the trunk."""

from __future__ import annotations

import os
import re
import secrets
import stat
from pathlib import Path

from fedsplit.durable import write_secret
from fedsplit.errors import InputError

_BYTES = 32


def read_token(path: Path) -> bytes:
    """Reads a token.

    Args:
        path: The file, which its owner alone can read.

    Raises:
        InputError: The file is missing, can be read by others, or holds no token. The message shows no content.

    Example:
        >>> read_token(Path("nowhere"))
        Traceback (most recent call last):
        fedsplit.errors.InputError: nowhere: No such file or directory
    """
    try:
        with open(path, encoding="ascii") as file:
            # Of the open file, since its name may lead to another file a moment later.
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            # A token is much shorter, and a file that is none may be of any size.
            text = file.read(1024).strip()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError:
        text = ""
    except ValueError as error:  # a path that no system has, such as one with a null character
        raise InputError(f"{str(path)!r}: {error}") from error
    if mode & 0o077:
        raise InputError(f"{path}: others than the owner can read the token; chmod 600 closes the file")
    if not re.fullmatch(rf"[0-9a-f]{{{2 * _BYTES}}}", text):
        raise InputError(f"{path}: the file holds no token of fedsplit serve")
    return bytes.fromhex(text)


def own_token(path: Path) -> bytes:
    """Returns the token in a file. Writes a new one if there is no file.

    A server that is started again has the same token, so that nobody needs to copy the file again.

    Raises:
        InputError: The file cannot be written, or `read_token` refuses the file.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "run.token"
        >>> own_token(path) == own_token(path) == read_token(path)
        True
    """
    try:
        # Written without a look before: of two servers that start at once, one writes, and the other one reads.
        write_secret(path, secrets.token_hex(_BYTES).encode() + b"\n")
    except FileExistsError:
        return read_token(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except ValueError:
        pass  # a path that no system has, as `read_token` says
    return read_token(path)
