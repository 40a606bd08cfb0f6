"""The network of a run: the profile of each client, and the trunk's own link. Read from a name or from a TOML file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedsplit.errors import InputError, SettingError, shortened
from fedsplit.network.profiles import BYTES_OF_A_MEGABIT, PROFILES, RANGES, Profile
from fedsplit.seeds import derive_seed

SETTING = "network.profile"

ALLOWED = f"{' | '.join(PROFILES)}, or a TOML file of profiles"

_TABLES = ("default", "trunk", "clients")
_WAYS = ("uplink_mbps", "downlink_mbps")


@dataclass(frozen=True)
class TrunkLink:
    """The trunk's own link, which all clients share.

    Attributes:
        uplink_mbps: Bandwidth towards the clients, in megabits a second.
        downlink_mbps: Bandwidth from the clients, in megabits a second.

    Example:
        >>> TrunkLink().to_clients
        125000000.0
    """

    uplink_mbps: float = 1000.0
    downlink_mbps: float = 1000.0

    @property
    def to_clients(self) -> float:
        """Bandwidth towards the clients in bytes a second."""
        return self.uplink_mbps * BYTES_OF_A_MEGABIT

    @property
    def from_clients(self) -> float:
        """Bandwidth from the clients in bytes a second."""
        return self.downlink_mbps * BYTES_OF_A_MEGABIT


@dataclass(frozen=True)
class Rule:
    """The profile of some clients.

    Attributes:
        profile: The profile.
        clients: Numbers and names of the clients.
        share: Share of all clients, drawn from the seed; 0 if `clients` lists them.
    """

    profile: Profile
    clients: tuple[int | str, ...] = ()
    share: float = 0.0


@dataclass(frozen=True)
class Fleet:
    """Profiles of all clients, before the clients' names are known.

    Attributes:
        default: Profile of clients without a rule.
        rules: Rules for some clients. A list wins over a share, and a later rule over an earlier one.
        trunk: The trunk's own link.
    """

    default: Profile
    rules: tuple[Rule, ...] = ()
    trunk: TrunkLink = TrunkLink()

    def check_clients(self, names: Sequence[str]) -> None:
        """Checks that every listed client exists.

        Args:
            names: Names of all clients, by number.

        Raises:
            SettingError: A rule lists a client that does not exist.
        """
        for rule in self.rules:
            for client in rule.clients:
                self.number_of(client, names)

    def profiles(self, names: Sequence[str], seed: int) -> list[Profile]:
        """Returns the profile of each client.

        Args:
            names: Names of all clients, by number.
            seed: Seed of the run, for shares.

        Raises:
            SettingError: A rule lists a client that does not exist.
        """
        chosen = [self.default] * len(names)
        order = sorted(range(len(names)), key=lambda client: derive_seed(seed, "network share", client))
        dealt = 0.0
        for rule in self.rules:
            if rule.share:
                # Rounded from the running sum, so that shares that add up to 1 leave no client out.
                begin = round(dealt * len(names))
                dealt += rule.share
                for client in order[begin : round(dealt * len(names))]:
                    chosen[client] = rule.profile
        for rule in self.rules:
            for listed in rule.clients:
                # Written last: a list wins over a share.
                chosen[self.number_of(listed, names)] = rule.profile
        return chosen

    def number_of(self, client: int | str, names: Sequence[str]) -> int:
        """Returns the number of a client that a rule lists.

        Raises:
            SettingError: No client has the number or the name.
        """
        if isinstance(client, int) and 0 <= client < len(names):
            return client
        if isinstance(client, str) and client in names:
            return names.index(client)
        words = f"the number of a client, from 0 to {len(names) - 1}, or a client's name"
        raise SettingError(f"{SETTING}, clients", shortened(client), words)


def read_fleet(spec: str) -> Fleet:
    """Reads the network of a run.

    Args:
        spec: Name of a profile, or the tables of a TOML file as JSON, as the setting holds them.

    Raises:
        SettingError: The text is neither.
        InputError: A table has a wrong value. The message names the value.

    Example:
        >>> read_fleet("home").default.uplink_mbps
        10
        >>> read_fleet("hom")
        Traceback (most recent call last):
        fedsplit.errors.SettingError: network.profile: hom is not possible; allowed: lan | wifi | 4g | home | wan, or \
a TOML file of profiles
    """
    if spec in PROFILES:
        return Fleet(PROFILES[spec])
    try:
        document = json.loads(spec)
    # Brackets in very many brackets end in a RecursionError.
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise SettingError(SETTING, shortened(spec), ALLOWED)
    try:
        return _fleet_of(document)
    except InputError as error:
        raise InputError(f"{SETTING}: {error}") from None


def _fleet_of(document: Mapping[str, Any]) -> Fleet:
    """Returns the network that a TOML document describes.

    Raises:
        InputError: A table or a value is wrong.
    """
    _check_names(document, _TABLES, "")
    default = _profile_of(_table(document, "default"), "default")
    trunk = _trunk_of(_table(document, "trunk"))
    listed = document.get("clients", [])
    if not isinstance(listed, list):
        raise InputError("clients is no list of tables; write [[clients]]")
    rules = tuple(_rule_of(table, number, default) for number, table in enumerate(listed, start=1))
    # Floats that should add up to 1 may exceed it by a rounding error.
    if sum(rule.share for rule in rules) > 1 + 1e-9:
        raise InputError("the shares of all [[clients]] add up to more than 1")
    return Fleet(default, rules, trunk)


def _table(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Returns a table of a document; an empty one if it is missing."""
    table = document.get(name, {})
    if not isinstance(table, dict):
        raise InputError(f"{name} is no table")
    return table


def _check_names(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Checks that a table has no unknown name."""
    for name in table:
        if name not in known:
            raise InputError(f"there is no {where}{shortened(name)}; there are {', '.join(known)}")


def _profile_of(table: Mapping[str, Any], where: str, base: Profile | None = None) -> Profile:
    """Returns the profile of a table: the fields of a named profile, or of `base`, with the table's own.

    Args:
        table: The table.
        where: Name of the table, for messages.
        base: Profile of fields that the table lacks; None for none.

    Raises:
        InputError: A field is unknown, missing, or has an impossible value.
    """
    _check_names(table, ("profile", *RANGES), f"{where}.")
    named = table.get("profile")
    if named is not None:
        if not isinstance(named, str) or named not in PROFILES:
            raise InputError(f"{where}.profile: {shortened(named)} is not possible; allowed: {' | '.join(PROFILES)}")
        # As a whole: no field of the network's default mixes with a named profile.
        base = PROFILES[named]
    fields = {name: value for name, value in table.items() if name != "profile"}
    if base is None:
        missing = [name for name in ("uplink_mbps", "downlink_mbps", "rtt_ms") if name not in fields]
        if missing:
            raise InputError(f"{where}: {missing[0]} is missing, and no profile is named that has it")
    try:
        return Profile(**fields) if base is None else dataclasses.replace(base, **fields)
    except InputError as error:
        raise InputError(f"{where}.{error}") from None


def _rule_of(table: object, number: int, default: Profile) -> Rule:
    """Returns a rule from a table of [[clients]].

    Raises:
        InputError: The table names no clients, or has a wrong value.
    """
    where = f"clients, table {number}"
    if not isinstance(table, dict):
        raise InputError(f"{where} is no table")
    fields = {name: value for name, value in table.items() if name not in ("clients", "share")}
    profile = _profile_of(fields, where, default)
    # True for both, and for neither.
    if ("clients" in table) == ("share" in table):
        raise InputError(f"{where} needs either clients or share")
    if "share" in table:
        share = table["share"]
        # `true` of TOML is an int in Python.
        is_number = isinstance(share, int | float) and not isinstance(share, bool)
        if not is_number or not 0 < share <= 1:
            raise InputError(f"{where}.share: {shortened(share)} is not possible; allowed: a number above 0, up to 1")
        return Rule(profile, share=float(share))
    listed = table["clients"]
    is_list = isinstance(listed, list) and all(type(client) in (int, str) for client in listed)
    if not is_list or not listed:
        raise InputError(f"{where}.clients: {shortened(listed)} is not possible; allowed: a list of numbers and names")
    return Rule(profile, clients=tuple(listed))


def _trunk_of(table: Mapping[str, Any]) -> TrunkLink:
    """Returns the trunk's link.

    Raises:
        InputError: A value is wrong.
    """
    _check_names(table, _WAYS, "trunk.")
    widths = {}
    for name, value in table.items():
        try:  # a profile has the checks of a bandwidth
            Profile(**{"uplink_mbps": 1.0, "downlink_mbps": 1.0, "rtt_ms": 0.0, name: value})
        except InputError as error:
            raise InputError(f"trunk.{error}") from None
        widths[name] = float(value)
    return TrunkLink(**widths)
