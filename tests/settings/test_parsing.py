"""Settings that are written in a form of their own."""

from __future__ import annotations

import pytest

from fedsplit.errors import SettingError
from fedsplit.settings.parsing import parse_cut, parse_memory, parse_partition, parse_quantization, parse_server


@pytest.mark.parametrize(
    ("text", "size"), [("800MB", 800 * 10**6), ("1.5GB", 1.5e9), ("2GiB", 2 * 2**30), ("3 kB", 3000), ("3", None)]
)
def test_memory_is_read_with_its_unit(text: str, size: float | None) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize(("text", "cut"), [("1:5", (1, 5)), ("5:1", None), ("1:1", None), ("1", None), ("a:b", None)])
def test_a_cut_is_two_numbers_that_rise(text: str, cut: tuple[int, int] | None) -> None:
    assert parse_cut(text) == cut


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("trunk:4,top:8", {"trunk": 4, "top": 8}),
        ("", {}),
        ("trunk:5", None),
        ("trunk:4,trunk:8", None),
        ("all:4", None),
    ],
)
def test_bits_are_told_by_part(text: str, bits: dict[str, int] | None) -> None:
    assert parse_quantization(text) == bits


def test_a_partition_that_cannot_be_is_refused_with_those_that_can() -> None:
    assert parse_partition("dirichlet:0.3:topic").column == "topic"
    with pytest.raises(SettingError, match=r"^partition: dirichlet:-1 is not possible; allowed: auto"):
        parse_partition("dirichlet:-1")


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:50052", ("127.0.0.1", 50052)),
        ("trunk.example:1", ("trunk.example", 1)),
        ("[::1]:65535", ("::1", 65535)),
        ("127.0.0.1", None),
        ("127.0.0.1:0", None),
        ("127.0.0.1:65536", None),
        (":50052", None),
        ("::1:50052", None),
        ("a b:1", None),
        ("http://trunk.example:1", None),
        ("trunk.example:\N{ARABIC-INDIC DIGIT ONE}", None),
        ("", None),
    ],
)
def test_a_server_is_a_host_and_a_port(text: str, address: tuple[str, int] | None) -> None:
    assert parse_server(text) == address
