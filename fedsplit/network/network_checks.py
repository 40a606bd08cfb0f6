"""Checks of a run's network, before any model is loaded."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator, Sequence

from fedsplit.errors import SettingError, check_all
from fedsplit.network.compute import read_recorded
from fedsplit.network.fleet import read_fleet
from fedsplit.settings.config import Config
from fedsplit.settings.sections import NetworkSettings


def check_network(config: Config) -> None:
    """Checks the network of a run, as far as possible without the clients' names.

    Raises:
        InputError: A profile or a compute time is wrong, a client does not exist, SimPy is missing, or a setting has no
            effect without a network. All errors are reported together.

    Example:
        >>> check_network(Config(network=NetworkSettings(over_select=1.5)))
        Traceback (most recent call last):
        fedsplit.errors.SettingError: network.over_select: 1.5 is not possible; allowed: 1.0 without --network
    """
    if not config.network.profile:
        check_all(_without_effect(config))
        return
    fleet = read_fleet(config.network.profile)
    for rule in fleet.rules:
        for client in rule.clients:
            if isinstance(client, int):
                # Without names, numbers alone can be checked. `check_client_names` checks the names.
                fleet.number_of(client, [""] * config.clients)
    if config.network.compute:
        read_recorded(config.network.compute)
    if importlib.util.find_spec("simpy") is None:
        allowed = "none without SimPy: install fedsplit[network]"
        raise SettingError("network.profile", "a network", allowed)


def _without_effect(config: Config) -> Iterator[SettingError]:
    """Yields an error for each setting that has no effect without a network."""
    for field in dataclasses.fields(NetworkSettings):
        value = getattr(config.network, field.name)
        if field.name != "profile" and value != field.default:
            shown = "a file" if field.name == "compute" else value
            allowed = f"{field.default or 'none'} without --network"
            yield SettingError(f"network.{field.name}", shown, allowed)


def check_client_names(config: Config, names: Sequence[str]) -> None:
    """Checks that the clients that a network lists exist.

    Args:
        config: Settings of the run.
        names: Names of all clients, by number.

    Raises:
        SettingError: A client does not exist.
    """
    if config.network.profile:
        read_fleet(config.network.profile).check_clients(names)
