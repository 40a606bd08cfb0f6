"""Networks from names and from tables: who gets which profile, and one line for each wrong value."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fedsplit.errors import InputError
from fedsplit.network.fleet import Fleet, TrunkLink, read_fleet
from fedsplit.network.profiles import PROFILES
from fedsplit.settings.choices import NETWORKS
from fedsplit.settings.validators import NETWORK

NAMES = [f"name {number}" for number in range(10)]


def fleet_of(**tables: Any) -> Fleet:
    return read_fleet(json.dumps(tables))


def test_the_settings_know_the_names() -> None:
    assert list(PROFILES) == list(NETWORKS)
    assert all(NETWORK.test(name) for name in PROFILES) and not NETWORK.test("hom")


def test_a_name_is_everybodys_profile() -> None:
    assert read_fleet("4g").profiles(NAMES, seed=0) == [PROFILES["4g"]] * 10


def test_lists_by_number_and_name_win_over_shares_and_the_default() -> None:
    fleet = fleet_of(
        default={"profile": "home", "compute": 0.5},
        clients=[
            {"clients": [0, "name 3"], "uplink_mbps": 1},
            {"share": 1.0, "profile": "4g"},
            {"clients": [3], "loss": 0.5},
        ],
    )
    profiles = fleet.profiles(NAMES, seed=0)
    assert (profiles[0].uplink_mbps, profiles[0].downlink_mbps, profiles[0].compute) == (1, 30, 0.5)
    assert (profiles[3].uplink_mbps, profiles[3].loss) == (10, 0.5)  # the later rule
    assert profiles[1] == PROFILES["4g"]


def test_shares_are_drawn_from_the_seed_and_disjoint() -> None:
    rules = [{"share": 0.3, "profile": "4g"}, {"share": 0.5, "profile": "wan"}]
    fleet = fleet_of(default={"profile": "lan"}, clients=rules)
    drawn = fleet.profiles(NAMES, seed=0)
    assert [drawn.count(PROFILES[name]) for name in ("4g", "wan", "lan")] == [3, 5, 2]
    assert fleet.profiles(NAMES, seed=0) == drawn != fleet.profiles(NAMES, seed=1)


def test_the_trunk_has_a_link_of_its_own() -> None:
    assert read_fleet("home").trunk == TrunkLink(1000.0, 1000.0)
    assert fleet_of(default={"profile": "lan"}, trunk={"uplink_mbps": 8}).trunk.to_clients == 1e6


HOME = {"profile": "home"}


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({}, "default: uplink_mbps is missing"),
        ({"default": {"uplink_mbps": 1, "rtt_ms": 1}}, "default: downlink_mbps is missing"),
        ({"default": HOME | {"uplink_mbps": -1}}, "default.uplink_mbps: -1 is not possible"),
        ({"default": HOME | {"uplnk": 1}}, "there is no default.uplnk; there are profile, uplink_mbps"),
        ({"default": {"profile": "hom"}}, "default.profile: hom is not possible; allowed: lan | wifi"),
        ({"default": 3}, "default is no table"),
        ({"defaults": HOME}, "there is no defaults; there are default, trunk, clients"),
        ({"default": HOME, "trunk": {"uplink_mbps": 0}}, "trunk.uplink_mbps: 0 is not possible"),
        ({"default": HOME, "trunk": {"rtt_ms": 0}}, "there is no trunk.rtt_ms"),
        ({"default": HOME, "clients": {"share": 1}}, r"write \[\[clients\]\]"),
        ({"default": HOME, "clients": [3]}, "clients, table 1 is no table"),
        ({"default": HOME, "clients": [{"loss": 0.1}]}, "table 1 needs either clients or share"),
        ({"default": HOME, "clients": [{"share": 2}]}, "table 1.share: 2 is not possible"),
        ({"default": HOME, "clients": [{"share": 0.6}, {"share": 0.6}]}, "add up to more than 1"),
        ({"default": HOME, "clients": [{"clients": []}]}, "table 1.clients: .* a list of numbers and names"),
        ({"default": HOME, "clients": [{"clients": [1], "compute": 0}]}, "table 1.compute: 0 is not possible"),
    ],
)
def test_a_wrong_table_is_named(tables: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=f"^network.profile: .*{words}"):
        read_fleet(json.dumps(tables))


@pytest.mark.parametrize("client", [10, -1, "nobody"])
def test_a_client_that_does_not_exist_is_named(client: int | str) -> None:
    fleet = fleet_of(default=HOME, clients=[{"clients": [client]}])
    with pytest.raises(InputError, match=f"{client} is not possible; allowed: the number of a client, from 0 to 9"):
        fleet.check_clients(NAMES)
