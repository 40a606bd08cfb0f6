"""Layout of a set of certificates: the folder of each party, as `fedsplit certificates` makes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fedsplit.wire.identities import read_identities
from fedsplit.wire.tls import CERTIFICATE

TRUNK, SUPERLINK, FEDERATION, CLIENTS = "trunk", "superlink", "federation", "clients"
"""Folders in a set: of the trunk, of Flower's SuperLink, of the federation's operator, and of all clients."""

NODE_KEY, NODE_PUBLIC_KEY = "supernode.key", "supernode.pub"
"""Files of a client with the keys by which a SuperLink knows the client's SuperNode."""


def names_in(folder: Path) -> dict[int, str]:
    """Returns the names of the clients in a set of certificates, by number.

    Args:
        folder: Folder of the set.

    Raises:
        InputError: The folder has no list of clients, or no right one.
    """
    return {number: name for name, number in read_identities(folder / TRUNK).clients.items()}


def folder_of(client: int | None, names: Mapping[int, str]) -> Path:
    """Returns the folder of a party within a set.

    Args:
        client: Number of a client; None for the operator of the federation.
        names: Names of the clients, by number.

    Example:
        >>> folder_of(1, {0: "north", 1: "south"}), folder_of(None, {})
        (PosixPath('clients/south'), PosixPath('federation'))
    """
    return Path(FEDERATION) if client is None else Path(CLIENTS) / names[client]


def is_of_one_party(folder: Path) -> bool:
    """Returns True for the folder of one party's certificate, such as `clients/north` of a set, and not for a set.

    Args:
        folder: The folder.
    """
    return (folder / CERTIFICATE).is_file()
