"""Checks of settings that must fit a trunk in a process of its own, on the side of the run and of the server."""

from __future__ import annotations

from collections.abc import Iterator

from fedsplit.errors import SettingError, check_all
from fedsplit.settings.config import Config
from fedsplit.trunk.schedules import SCHEDULES


def check_remote(config: Config) -> None:
    """Checks the settings of a run that uses the trunk of a server.

    Raises:
        InputError: A setting does not go with `trunk.server`, or has no effect without. All errors are reported
            together.

    Example:
        >>> from fedsplit.settings.documents import build
        >>> check_remote(build({"trunk.tls": "certificates"}))
        Traceback (most recent call last):
        fedsplit.errors.SettingError: trunk.tls: certificates is not possible; allowed: none without --trunk.server
    """
    if not config.trunk.server:
        check_all(_without_effect(config))
        return
    check_all(_beyond_one_process(config, "with --trunk.server"), _wrong_engine(config))


def check_served(config: Config) -> None:
    """Checks the settings of a trunk for `fedsplit serve`.

    Raises:
        InputError: The settings ask for a trunk that a server cannot offer. All errors are reported together.

    Example:
        >>> from fedsplit.settings.documents import build
        >>> check_served(build({"trunk.replicas": 2}))
        Traceback (most recent call last):
        fedsplit.errors.SettingError: trunk.replicas: 2 is not possible; allowed: 1 for fedsplit serve
    """
    check_all(_beyond_one_process(config, "for fedsplit serve"))


def _beyond_one_process(config: Config, reason: str) -> Iterator[SettingError]:
    """Yields an error for each setting of a trunk that is not in one piece in one process.

    Args:
        config: The settings.
        reason: Words for the message.
    """
    trunk = config.trunk
    if trunk.stages:
        yield SettingError("trunk.stages", trunk.stages, f"none {reason}")
    if trunk.replicas > 1:
        yield SettingError("trunk.replicas", trunk.replicas, f"1 {reason}")
    if trunk.tensor_parallel > 1:
        yield SettingError("trunk.tensor_parallel", trunk.tensor_parallel, f"1 {reason}")
    if trunk.memory:
        yield SettingError("trunk.memory", trunk.memory, f"no limit {reason}")
    if config.network.profile:
        yield SettingError("network.profile", "a network", f"none {reason}: its clock needs the trunk in the same run")


def _wrong_engine(config: Config) -> Iterator[SettingError]:
    """Yields an error for an engine whose clients could not use the trunk of a server."""
    if config.engine == "ray" and config.ray.address != "local":
        allowed = "local with --trunk.server: nodes of a cluster do not have the token"
        yield SettingError("ray.address", config.ray.address, allowed)
    schedule = SCHEDULES[config.trunk.schedule]
    waits = schedule.gathers or (schedule.sums and config.trunk.every > 0)
    if config.engine == "local" and waits and not config.deterministic:
        allowed = "one without waits, with --trunk.server and the engine local, which plays one client after the other"
        yield SettingError("trunk.schedule", config.trunk.schedule, allowed)


def _without_effect(config: Config) -> Iterator[SettingError]:
    """Yields an error for each setting of a server without a server."""
    if config.resume:  # the file of the run may have them
        return
    for name in ("token_file", "tls"):
        value = getattr(config.trunk, name)
        if value:
            yield SettingError(f"trunk.{name}", value, "none without --trunk.server")
