"""Callers of a gRPC server: who opens a stream, and what the caller may do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedsplit.wire.chunks import Refused
from fedsplit.wire.grpc_address import CLIENT, Metadata, entry
from fedsplit.wire.identities import Identities
from fedsplit.wire.packets import Packet

OPERATOR = "the operator"
"""Place of all callers without a client's number, among the clients that a server counts."""


@dataclass(frozen=True)
class Caller:
    """Who opens a stream.

    Attributes:
        client: Number of the client; None for the operator, or for a process on this machine that names no client.
        is_operator: True if the caller may send control requests.
        sends_packets: True if the caller may send packets.
    """

    client: int | None
    is_operator: bool
    sends_packets: bool

    @property
    def place(self) -> object:
        """Key of the caller among all callers that a server counts."""
        return OPERATOR if self.client is None else self.client

    def check_packets(self) -> None:
        """Checks that the caller may send packets.

        Raises:
            Refused: The caller is the operator.
        """
        if not self.sends_packets:
            raise Refused("PERMISSION_DENIED", "the operator is no client, and may send no packets")

    def check_control(self) -> None:
        """Checks that the caller may send control requests.

        Raises:
            Refused: The caller is a client.
        """
        if not self.is_operator:
            raise Refused("PERMISSION_DENIED", f"client {self.client} is not the operator, and may not control the run")

    def check(self, packet: Packet) -> None:
        """Checks that a packet is the caller's own.

        Raises:
            Refused: The packet is of another client.

        Example:
            >>> from fedsplit.wire.packets import StepKey
            >>> caller = Caller(client=0, is_operator=False, sends_packets=True)
            >>> caller.check(Packet(StepKey(round=1, client=1, step=0)))
            Traceback (most recent call last):
            fedsplit.wire.chunks.Refused: client 0 sent a packet as client 1
        """
        if self.client is not None and packet.key.client != self.client:
            words = f"client {self.client} sent a packet as client {packet.key.client}"
            raise Refused("PERMISSION_DENIED", words)


def caller_of(
    metadata: Metadata,
    certificate: Mapping[str, Sequence[bytes]],
    identities: Identities | None,
) -> Caller:
    """Returns who opens a stream.

    With TLS, the certificate decides. Without TLS, all callers are processes on this machine that know the token. Such
    a process may play one client, several clients, or the operator.

    Args:
        metadata: Metadata of the request.
        certificate: Facts of the caller's certificate, as gRPC has checked it.
        identities: Names of clients and operator; None without TLS.

    Raises:
        Refused: The certificate has an unknown name, or the request names another client.
    """
    named = entry(metadata, CLIENT)
    # 18 digits are enough for every number, and `int` refuses thousands of them with an error of its own.
    if named and not (named.isascii() and named.isdigit() and len(named) < 19):
        raise Refused("INVALID_ARGUMENT", f"{CLIENT} is no number of a client")
    if identities is None:
        return Caller(int(named) if named else None, is_operator=True, sends_packets=True)

    names = certificate.get("x509_common_name", ())
    name = bytes(names[0]).decode(errors="replace") if names else ""
    if name == identities.federation:
        return Caller(None, is_operator=True, sends_packets=False)
    if name not in identities.clients:
        raise Refused("PERMISSION_DENIED", f"the certificate's name {name[:64]!r} is no client's name")
    number = identities.clients[name]
    if named and int(named) != number:
        raise Refused("PERMISSION_DENIED", f"the certificate of client {number} does not make a client {int(named)}")
    return Caller(number, is_operator=False, sends_packets=True)
