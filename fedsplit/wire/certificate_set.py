"""Certificates for tests: an authority, and a folder of certificate and key for each party of a federation."""

from __future__ import annotations

import datetime
import ipaddress
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedsplit.durable import write_secret
from fedsplit.wire.identities import CLIENTS_FILE
from fedsplit.wire.set_layout import CLIENTS, FEDERATION, NODE_KEY, NODE_PUBLIC_KEY, SUPERLINK, TRUNK
from fedsplit.wire.tls import CA, CERTIFICATE, KEY

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Names by which a trunk on the same machine is reached."""

_PEM = serialization.Encoding.PEM

_EARLIER = datetime.timedelta(minutes=5)
"""Time before the making from which on certificates are valid: clocks of two machines differ."""


class _Authority:
    """An authority that issues the certificates of one set. Its key is in memory alone, and is lost with it."""

    def __init__(self, days: int) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._begin = datetime.datetime.now(datetime.UTC) - _EARLIER
        self._end = self._begin + _EARLIER + datetime.timedelta(days=days)
        self._name = _named("fedsplit test authority")
        unsigned = self._unsigned(self._name, self._key.public_key())
        # A path of length 0: no certificate of the set can be an authority itself.
        unsigned = unsigned.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        unsigned = unsigned.add_extension(_key_usage(signs_certificates=True), critical=True)
        unsigned = unsigned.add_extension(
            x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False
        )
        self.certificate = unsigned.sign(self._key, hashes.SHA256())

    def _unsigned(self, subject: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(self._begin)
            .not_valid_after(self._end)
        )

    def write_party(self, folder: Path, name: str, hosts: Sequence[str] = ()) -> None:
        """Writes the folder of a party.

        Args:
            folder: The folder, which does not exist.
            name: Name of the party: the common name of its certificate.
            hosts: Names and addresses by which the party is called; none for a party that only calls.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        unsigned = self._unsigned(_named(name), key.public_key())
        unsigned = unsigned.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        unsigned = unsigned.add_extension(_key_usage(signs_certificates=False), critical=True)
        both_sides = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        unsigned = unsigned.add_extension(x509.ExtendedKeyUsage(both_sides), critical=False)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        unsigned = unsigned.add_extension(issuer, critical=False)
        if hosts:
            names = x509.SubjectAlternativeName([_host(host) for host in hosts])
            unsigned = unsigned.add_extension(names, critical=False)
        certificate = unsigned.sign(self._key, hashes.SHA256())

        folder.mkdir(parents=True, mode=0o700)
        (folder / CA).write_bytes(self.certificate.public_bytes(_PEM))
        (folder / CERTIFICATE).write_bytes(certificate.public_bytes(_PEM))
        secret = key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        write_secret(folder / KEY, secret)


def write_set(
    folder: Path,
    clients: Sequence[str],
    hosts: Sequence[str] = (),
    days: int = 30,
) -> None:
    """Writes a set of certificates for tests. The folder is complete, or is not there.

    Certificates of trunk and SuperLink name hosts, so that whoever checks hosts takes no other party for one of them.

    Args:
        folder: The folder, which is empty or does not exist.
        clients: Names of the clients, in the order of their numbers.
        hosts: Names and addresses of the trunk and of the SuperLink, beside those of this machine alone.
        days: Days until all certificates expire.

    Raises:
        OSError: The folder is not empty, or cannot be written.

    Example:
        >>> folder = Path(tempfile.mkdtemp()) / "certificates"
        >>> write_set(folder, ["north", "south"])
        >>> print((folder / "trunk" / "clients.toml").read_text())
        federation = "federation"
        <BLANKLINE>
        [clients]
        north = 0
        south = 1
        <BLANKLINE>
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".draft", dir=folder.parent))
    try:
        authority = _Authority(days)
        named_hosts = [*LOOPBACK, *(host for host in hosts if host not in LOOPBACK)]
        for server in (TRUNK, SUPERLINK):
            authority.write_party(draft / server, server, named_hosts)
        numbers = "".join(f"{name} = {number}\n" for number, name in enumerate(clients))
        (draft / TRUNK / CLIENTS_FILE).write_text(f'federation = "{FEDERATION}"\n\n[clients]\n{numbers}')
        authority.write_party(draft / FEDERATION, FEDERATION)
        for name in clients:
            authority.write_party(draft / CLIENTS / name, name)
            _write_node_keys(draft / CLIENTS / name)
        os.rename(draft, folder)  # fails on a folder that is not empty
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_node_keys(folder: Path) -> None:
    """Writes the keys of a SuperNode, of the curve and in the form that Flower takes."""
    key = ec.generate_private_key(ec.SECP384R1())
    secret = key.private_bytes(_PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    write_secret(folder / NODE_KEY, secret)
    (folder / NODE_PUBLIC_KEY).write_bytes(public + b"\n")


def _named(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _host(text: str) -> x509.GeneralName:
    """Returns an address or a name of a host, as a certificate has it.

    Example:
        >>> _host("10.0.0.7"), _host("trunk.example")
        (<IPAddress(value=10.0.0.7)>, <DNSName(value='trunk.example')>)
    """
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _key_usage(signs_certificates: bool) -> x509.KeyUsage:
    """Returns the uses of a key: to sign certificates, or to sign the handshakes of connections."""
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
