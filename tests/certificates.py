"""Certificates for tests: an authority, and folders of nodes as the setting `wire.tls` wants them."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_PEM = serialization.Encoding.PEM


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


class Authority:
    """An authority that issues certificates."""

    def __init__(self, name: str = "authority") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        self.certificate = self._signed(self._name, self._key.public_key(), is_authority=True)

    def _signed(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, is_authority: bool = False, days: int = 1
    ) -> x509.Certificate:
        hosts = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=30))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
            .sign(self._key, hashes.SHA256())
        )

    def folder(
        self,
        path: Path,
        days: int = 1,
        password: bytes | None = None,
        ca: Authority | None = None,
        name: str = "node",
    ) -> Path:
        """Writes the folder of a node.

        Args:
            path: The folder.
            days: Days until the certificate expires; negative for one that has expired.
            password: Encrypts the key.
            ca: Authority whose certificate is written as the one to trust; None for this one.
            name: Common name in the certificate.
        """
        path.mkdir(parents=True, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        issued = self._signed(_name(name), key.public_key(), days=days)
        lock = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
        (path / "ca.pem").write_bytes((ca or self).certificate.public_bytes(_PEM))
        (path / "cert.pem").write_bytes(issued.public_bytes(_PEM))
        (path / "key.pem").write_bytes(key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, lock))
        return path
