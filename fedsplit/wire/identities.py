"""Identities: which certificate is which client, and which one is the operator's.

The file `clients.toml` lies in the server's folder of certificates::

    federation = "operator"

    [clients]
    hospital-a = 0
    hospital-b = 1

A name is the common name of a certificate. A client's number is the number of the client's partition.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsplit.errors import InputError, first_line

CLIENTS_FILE = "clients.toml"


@dataclass(frozen=True)
class Identities:
    """Names in certificates, and what they stand for.

    Attributes:
        folder: Folder with the server's certificates.
        clients: Numbers of the clients by name.
        federation: Name of the operator, who runs the federation's loop.

    Example:
        >>> identities = Identities(Path("tls"), {"hospital-a": 0}, "operator")
        >>> identities.clients["hospital-a"]
        0
    """

    folder: Path
    clients: Mapping[str, int]
    federation: str


def read_identities(folder: Path) -> Identities:
    """Reads the file `clients.toml` of a folder.

    Raises:
        InputError: The file is missing, or is not what it must be. The message names the file.

    Example:
        >>> read_identities(Path("nowhere"))
        Traceback (most recent call last):
        fedsplit.errors.InputError: nowhere/clients.toml: No such file or directory
    """
    path = folder / CLIENTS_FILE
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: {first_line(error)}") from error
    clients = table.get("clients")
    if not isinstance(clients, dict) or not clients or not all(map(_is_number, clients.values())):
        raise InputError(f"{path}: [clients] must have lines such as: hospital-a = 0")
    if len(set(clients.values())) < len(clients):
        raise InputError(f"{path}: two clients have the same number")
    federation = table.get("federation")
    if not isinstance(federation, str) or not federation:
        raise InputError(f'{path}: the name of the operator is missing, such as: federation = "operator"')
    if federation in clients:
        raise InputError(f"{path}: {federation!r} is a client, and cannot be the operator, too")
    return Identities(folder, clients, federation)


def _is_number(value: Any) -> bool:
    # Not `isinstance`, for which true is a number, too.
    return type(value) is int and value >= 0
