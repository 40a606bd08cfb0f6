"""Callers: the certificate decides who calls, whatever the request says."""

from __future__ import annotations

from pathlib import Path

import pytest
from grpc_parties import packet

from fedsplit.wire.callers import Caller, caller_of
from fedsplit.wire.chunks import Refused
from fedsplit.wire.grpc_address import CLIENT
from fedsplit.wire.identities import Identities

KNOWN = Identities(Path("tls"), {"a": 0, "b": 7}, "operator")


def certificate(name: str) -> dict[str, list[bytes]]:
    return {"x509_common_name": [name.encode()]}


@pytest.mark.parametrize("said", [[], [(CLIENT, "7")]], ids=["unsaid", "said"])
def test_a_clients_name_is_its_number(said: list[tuple[str, str]]) -> None:
    caller = caller_of(said, certificate("b"), KNOWN)
    assert caller.client == caller.place == 7
    caller.check_packets()
    caller.check(packet(client=7))
    with pytest.raises(Refused, match="client 7 sent a packet as client 0"):
        caller.check(packet(client=0))
    with pytest.raises(Refused, match="client 7 is not the operator"):
        caller.check_control()


def test_the_operator_controls_and_sends_no_packets() -> None:
    caller = caller_of([], certificate("operator"), KNOWN)
    caller.check_control()
    with pytest.raises(Refused, match="the operator is no client") as refused:
        caller.check_packets()
    assert refused.value.status == "PERMISSION_DENIED"


@pytest.mark.parametrize(
    ("said", "facts", "words"),
    [
        ([(CLIENT, "0")], certificate("b"), "the certificate of client 7 does not make a client 0"),
        ([], certificate("c"), "the certificate's name 'c' is no client's name"),
        ([], {}, "the certificate's name '' is no client's name"),
        ([], {"x509_common_name": [b"\xff" * 300]}, "is no client's name"),
    ],
    ids=["another", "unknown", "nameless", "no text"],
)
def test_an_identity_that_does_not_fit_is_refused(said, facts, words: str) -> None:
    with pytest.raises(Refused, match=words) as refused:
        caller_of(said, facts, KNOWN)
    assert refused.value.status == "PERMISSION_DENIED" and len(str(refused.value)) < 200


@pytest.mark.parametrize("text", ["x", "-1", "1.5", "٣", "9" * 19])
def test_a_client_is_a_number(text: str) -> None:
    with pytest.raises(Refused, match="no number of a client") as refused:
        caller_of([(CLIENT, text)], {}, None)
    assert refused.value.status == "INVALID_ARGUMENT"


def test_without_certificates_a_process_may_be_anybody_of_this_machine() -> None:
    one = caller_of([(CLIENT, "3")], {}, None)
    one.check_control()
    with pytest.raises(Refused, match="client 3 sent a packet as client 0"):
        one.check(packet(client=0))
    several = caller_of([], {}, None)
    for client in range(3):
        several.check(packet(client=client))
    assert Caller(0, True, True).place != several.place
