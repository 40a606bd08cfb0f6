"""Connections to the server of a trunk, by the settings of a run."""

from __future__ import annotations

from pathlib import Path

from fedsplit.errors import InputError, SettingError
from fedsplit.settings.config import Config
from fedsplit.trunk.remote import Dial, RemoteTrunk
from fedsplit.wire.grpc_address import GrpcAddress, check_encrypted
from fedsplit.wire.grpc_client import GrpcClient
from fedsplit.wire.set_layout import folder_of, is_of_one_party, names_in
from fedsplit.wire.tls import problem
from fedsplit.wire.token_files import read_token


def dial_of(config: Config, patience: float | None = None) -> Dial:
    """Returns the function that connects to the trunk's server.

    The token is read now: a server that was started again may have a new one.

    Args:
        config: Settings of the run, with `trunk.server`.
        patience: Seconds for which a connection tries to reach the server; None for `trunk.wait`.

    Raises:
        InputError: The token or the certificates cannot be read.
    """
    trunk = config.trunk
    host, port = trunk.server_address
    token = read_token(Path(trunk.token_file))
    # The folder has the certificate of one party, or a set with a folder for each party.
    is_own = is_of_one_party(Path(trunk.tls))
    names = names_in(Path(trunk.tls)) if trunk.tls and not is_own else {}

    def dial(client: int | None) -> GrpcClient:
        folder = ""
        if trunk.tls:
            folder = trunk.tls if is_own else str(Path(trunk.tls) / folder_of(client, names))
        address = GrpcAddress(host, port, folder, token)
        return GrpcClient(
            address, client, patience=trunk.wait if patience is None else patience, silence=config.timeout
        )

    return dial


def find_remote(run: str, config: Config) -> RemoteTrunk:
    """Returns the trunk of a run for the clients of this process.

    Args:
        run: Name of the run.
        config: Settings of the run, with `trunk.server`.
    """
    return RemoteTrunk(run, dial_of(config), is_operator=False)


def check_server(config: Config) -> None:
    """Checks that token and certificates for a trunk's server can be used. The server itself is not asked.

    Raises:
        SettingError: The token or the certificates cannot be used.
    """
    trunk = config.trunk
    if not trunk.server:
        return
    try:
        if not trunk.token_file:
            raise InputError("no file was named")
        read_token(Path(trunk.token_file))
    except InputError as error:
        allowed = f"the file with the token that fedsplit serve has written ({error})"
        raise SettingError("trunk.token_file", trunk.token_file or "nothing", allowed) from error
    try:
        check_encrypted(trunk.server_address[0], trunk.tls)
    except InputError as error:
        raise SettingError(
            "trunk.server", trunk.server, f"an address of this machine without --trunk.tls ({error})"
        ) from error
    if trunk.tls and is_of_one_party(Path(trunk.tls)):
        if reason := problem(Path(trunk.tls)):
            raise SettingError("trunk.tls", trunk.tls, f"a folder with the party's certificate ({reason})")
    elif trunk.tls:
        _check_set(config, Path(trunk.tls))


def _check_set(config: Config, folder: Path) -> None:
    """Checks that a folder has certificates for the federation and for all clients.

    Raises:
        SettingError: A certificate is missing, or cannot be used.
    """
    allowed = f"a folder that fedsplit certificates has made, with {config.clients} clients or more"
    try:
        names = names_in(folder)
    except InputError as error:
        raise SettingError("trunk.tls", folder, f"{allowed} ({error})") from error
    for client in (None, *range(config.clients)):
        if client is not None and client not in names:
            raise SettingError("trunk.tls", folder, f"{allowed} (client {client} has no certificate)")
        reason = problem(folder / folder_of(client, names))
        if reason:
            raise SettingError("trunk.tls", folder, f"{allowed} ({reason})")
