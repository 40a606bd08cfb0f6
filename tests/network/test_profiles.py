"""Profiles of links and devices: checks, units and names."""

from __future__ import annotations

import math

import pytest

from fedsplit.errors import InputError
from fedsplit.network.profiles import PROFILES, RANGES, Profile


def test_home_is_the_line_of_the_question() -> None:
    home = PROFILES["home"]
    assert (home.uplink_mbps, home.downlink_mbps) == (10, 30)
    assert (home.uplink_bytes, home.downlink_bytes) == (1.25e6, 3.75e6)


def test_names_of_profiles() -> None:
    assert list(PROFILES) == ["lan", "wifi", "4g", "home", "wan"]


def test_every_field_has_a_range() -> None:
    assert RANGES.keys() == PROFILES["lan"].document().keys()


@pytest.mark.parametrize("field", RANGES)
@pytest.mark.parametrize("value", [-1, math.nan, math.inf, "10", None, True, 10**400])
def test_impossible_values_name_their_field(field: str, value: object) -> None:
    fields = {"uplink_mbps": 1, "downlink_mbps": 1, "rtt_ms": 1} | {field: value}
    with pytest.raises(InputError, match=f"^{field}: "):
        Profile(**fields)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("uplink_mbps", 1e-300),
        ("downlink_mbps", 1.1e6),
        ("rtt_ms", 1e300),
        ("jitter_ms", 3_600_001),
        ("compute", 1e-5),
        ("loss", 0.999999999),
        ("availability", 0),
        ("availability", 1.5),
    ],
)
def test_values_at_the_border(field: str, value: float) -> None:
    with pytest.raises(InputError, match=f"^{field}: "):
        Profile(**{"uplink_mbps": 1, "downlink_mbps": 1, "rtt_ms": 1} | {field: value})


def test_no_latency_and_no_loss_are_possible() -> None:
    assert Profile(uplink_mbps=1, downlink_mbps=1, rtt_ms=0).document()["jitter_ms"] == 0.0
