"""Addresses: packets leave a machine with TLS only, and a token is not shown."""

from __future__ import annotations

import pytest

from fedsplit.errors import InputError
from fedsplit.wire.chunks import Refused
from fedsplit.wire.grpc_address import GrpcAddress, authorization, check_encrypted, check_token, entry


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "localhost"])
def test_loopback_needs_no_certificates(host: str) -> None:
    check_encrypted(host, "")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", "localhost.example.org", ""])
def test_all_else_needs_certificates(host: str) -> None:
    with pytest.raises(InputError, match="without certificates, gRPC is for this machine only"):
        check_encrypted(host, "")
    check_encrypted(host, "folder")


def test_a_target_can_be_of_either_family() -> None:
    assert GrpcAddress("127.0.0.1", 1).target == "127.0.0.1:1"
    assert GrpcAddress("::1", 1).target == "[::1]:1"


def test_a_token_is_not_shown() -> None:
    assert "7365" not in repr(GrpcAddress("127.0.0.1", 1, token=b"secret")) and "secret" not in repr(
        GrpcAddress("127.0.0.1", 1, token=b"secret")
    )


@pytest.mark.parametrize(
    "metadata",
    [[], [authorization(b"guess")], [("authorization", "secret")], [("authorization", "é")], [authorization(b"")]],
    ids=["none", "guess", "bare", "no ascii", "empty"],
)
def test_a_wrong_token_is_refused(metadata: list[tuple[str, str]]) -> None:
    with pytest.raises(Refused, match="the token of the run is missing or wrong") as refused:
        check_token(metadata, b"secret")
    assert refused.value.status == "UNAUTHENTICATED"
    check_token([("other", "x"), authorization(b"secret")], b"secret")


def test_an_entry_is_a_text_or_empty() -> None:
    assert entry(None, "x") == entry([("x", b"bytes"), ("y", "z")], "x") == ""
