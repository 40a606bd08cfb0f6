"""Certificates for tests: each party has a folder of its own, and nobody is taken for the trunk."""

from __future__ import annotations

import ssl
import stat
import tomllib
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedsplit.wire.certificate_set import write_set
from fedsplit.wire.set_layout import NODE_KEY, NODE_PUBLIC_KEY
from fedsplit.wire.tls import CA, CERTIFICATE, KEY, problem

PARTIES = {name: name for name in ("trunk", "superlink", "federation")}
PARTIES |= {"clients/north": "north", "clients/south": "south"}
"""Name of the party by folder."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates") / "set"
    write_set(folder, ["north", "south"], ["trunk.example", "10.0.0.7"], days=2)
    return folder


def certificate_in(folder: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / CERTIFICATE).read_bytes())


@pytest.mark.parametrize("party", PARTIES)
def test_every_folder_can_play_both_sides_and_names_its_party(party: str, made: Path) -> None:
    folder = made / party
    assert problem(folder) == ""
    certificate = certificate_in(folder)
    (name,) = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    assert name.value == PARTIES[party]
    public = certificate.public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey) and public.curve.name == "secp256r1"


@pytest.mark.parametrize("party", PARTIES)
def test_a_key_is_for_its_owner_alone(party: str, made: Path) -> None:
    assert stat.S_IMODE((made / party / KEY).stat().st_mode) == 0o600
    assert stat.S_IMODE((made / party).stat().st_mode) == 0o700


def test_the_set_has_no_further_files_and_one_authority(made: Path) -> None:
    """The key of the authority is nowhere."""
    files = {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()}
    expected = {f"{party}/{name}" for party in PARTIES for name in (CA, CERTIFICATE, KEY)}
    of_nodes = {f"{party}/{name}" for party in PARTIES if "clients" in party for name in (NODE_KEY, NODE_PUBLIC_KEY)}
    assert files == {*expected, *of_nodes, "trunk/clients.toml"}
    assert len({(made / party / CA).read_bytes() for party in PARTIES}) == 1


def test_the_trunk_knows_clients_by_their_order(made: Path) -> None:
    known = tomllib.loads((made / "trunk" / "clients.toml").read_text())
    assert known == {"federation": "federation", "clients": {"north": 0, "south": 1}}


def test_a_supernode_has_keys_that_flower_takes(made: Path) -> None:
    folder = made / "clients" / "north"
    assert stat.S_IMODE((folder / NODE_KEY).stat().st_mode) == 0o600
    key = serialization.load_ssh_private_key((folder / NODE_KEY).read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name == "secp384r1"
    public = serialization.load_ssh_public_key((folder / NODE_PUBLIC_KEY).read_bytes())
    assert public == key.public_key()


@pytest.mark.parametrize("server", ["trunk", "superlink"])
def test_only_servers_have_hosts(server: str, made: Path) -> None:
    names = certificate_in(made / server).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "trunk.example"]
    addresses = [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    assert addresses == ["127.0.0.1", "::1", "10.0.0.7"]
    for party in PARTIES.keys() - {"trunk", "superlink"}:
        with pytest.raises(x509.ExtensionNotFound):
            certificate_in(made / party).extensions.get_extension_for_class(x509.SubjectAlternativeName)


@pytest.mark.parametrize(("party", "is_trusted"), [("trunk", True), ("clients/north", False)])
def test_a_client_is_not_taken_for_the_trunk(party: str, is_trusted: bool, made: Path) -> None:
    """By somebody who checks the name of the host, as gRPC does."""
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(made / party / CERTIFICATE, made / party / KEY)
    client_context = ssl.create_default_context(cafile=made / "federation" / CA)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_context.wrap_bio(up, down, server_side=True)
    client = client_context.wrap_bio(down, up, server_hostname="127.0.0.1")

    def shake() -> None:
        for _ in range(4):
            for side in (client, server):
                try:
                    side.do_handshake()
                except ssl.SSLWantReadError:
                    continue

    if is_trusted:
        shake()
        assert client.version() == "TLSv1.3"
    else:
        with pytest.raises(ssl.SSLCertVerificationError):
            shake()


def test_nothing_is_overwritten_and_nothing_half_made_is_left(made: Path, tmp_path: Path) -> None:
    before = (made / "trunk" / KEY).read_bytes()
    with pytest.raises(OSError):
        write_set(made, ["east"])
    assert (made / "trunk" / KEY).read_bytes() == before
    assert [path.name for path in made.parent.iterdir()] == ["set"]
    empty = tmp_path / "empty"
    empty.mkdir()
    write_set(empty, ["east"])
    assert problem(empty / "clients" / "east") == ""


def test_the_certificates_expire(made: Path) -> None:
    certificate = certificate_in(made / "clients" / "north")
    assert (certificate.not_valid_after_utc - certificate.not_valid_before_utc).days == 2
