"""Addresses of gRPC servers, and what a client and a server say about themselves in metadata."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, field

from fedsplit.errors import InputError
from fedsplit.wire.chunks import Refused

CLIENT = "fedsplit-client"
"""Metadata of a request: the number of the client. A certificate says more, and must not say otherwise."""

REQUEST = "fedsplit-request"
"""Metadata of a control request: the identity of the request, the same when the request is repeated."""

LIFE = "fedsplit-life"
"""Metadata of an answer, and of a repeated control request: the identity of one start of the server."""

ERROR = "fedsplit-error"
"""Metadata at the end of a control request that failed: the name of the error."""

_AUTHORIZATION = "authorization"

Metadata = Iterable[tuple[str, str | bytes]]


@dataclass(frozen=True)
class GrpcAddress:
    """Address of a gRPC server, with the secrets to be served.

    Attributes:
        host: Name or IP address of the server's machine. With TLS, the server's certificate must have the same name.
        port: Port of the server.
        tls: Folder with `ca.pem`, `cert.pem` and `key.pem`; empty for a server on this machine without TLS.
        token: Token of the run.

    Example:
        >>> GrpcAddress("127.0.0.1", 50052, token=b"secret")
        GrpcAddress(host='127.0.0.1', port=50052, tls='')
    """

    host: str
    port: int
    tls: str = ""
    token: bytes = field(default=b"", repr=False)

    @property
    def target(self) -> str:
        """The address as gRPC wants it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def check_encrypted(host: str, tls: str) -> None:
    """Checks that packets leave this machine with TLS only.

    Args:
        host: Name or IP address of the server.
        tls: Folder of certificates; empty for none.

    Raises:
        InputError: There are no certificates, and the server is not on loopback.

    Example:
        >>> check_encrypted("127.0.0.1", "")
        >>> check_encrypted("192.0.2.7", "")
        Traceback (most recent call last):
        fedsplit.errors.InputError: 192.0.2.7: without certificates, gRPC is for this machine only, such as 127.0.0.1
    """
    if not tls and not _is_loopback(host):
        words = "without certificates, gRPC is for this machine only, such as 127.0.0.1"
        raise InputError(f"{host or 'all addresses'}: {words}")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which may lead anywhere
        return False


def authorization(token: bytes) -> tuple[str, str]:
    """Returns the metadata that carries a token."""
    return _AUTHORIZATION, f"Bearer {token.hex()}"


def check_token(metadata: Metadata, token: bytes) -> None:
    """Checks the token of a request.

    Raises:
        Refused: The token is missing or wrong.

    Example:
        >>> check_token([authorization(b"right")], b"right")
        >>> check_token([authorization(b"guess")], b"right")
        Traceback (most recent call last):
        fedsplit.wire.chunks.Refused: the token of the run is missing or wrong
    """
    came = entry(metadata, _AUTHORIZATION)
    _, right = authorization(token)
    # In constant time: a guess learns nothing.
    if not hmac.compare_digest(came.encode(), right.encode()):
        raise Refused("UNAUTHENTICATED", "the token of the run is missing or wrong")


def entry(metadata: Metadata | None, name: str) -> str:
    """Returns the text with a name in metadata; an empty text if there is none.

    Example:
        >>> entry([("fedsplit-client", "3")], CLIENT)
        '3'
    """
    for key, value in metadata or ():
        if key == name and isinstance(value, str):
            return value
    return ""
