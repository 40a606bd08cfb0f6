"""The place of a run's trunk: a process that the engine starts, or the server that the settings name."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from fedsplit.client.link import TrunkLike
from fedsplit.errors import InputError, SettingError
from fedsplit.federation.attempts import TRIES
from fedsplit.federation.clients import FederationFailed
from fedsplit.federation.trunk_terms import terms_of
from fedsplit.settings.config import Config
from fedsplit.trunk.port import TrunkPort
from fedsplit.trunk.run_terms import Begun, Terms
from fedsplit.wire.packets import new_trunk_name
from fedsplit.wire.tls import NotTrusted
from fedsplit.wire.transport import TrunkLost
from fedsplit.wire.typed_values import MalformedValue

_FIRST_SECONDS = 10.0
"""Time in which the server must answer as a run starts. A wrong address should not keep the user waiting."""

_LAST_SECONDS = 1.0
"""Time in which the server must answer at the end of a run. A server that is gone needs not know of the end."""


class RunTrunk(TrunkPort, Protocol):
    """The trunk of a run, as an engine has it."""

    def weigh(self, config: Config) -> Config:
        """Divides the clients among replicas by speed, if the settings ask for it; see `fedsplit.trunk.doors.weigh`."""
        ...

    def nodes(self) -> list[str]:
        """Returns Ray's ids of the nodes with processes of the trunk; none for a trunk outside of Ray."""
        ...

    def kill(self) -> None:
        """Ends the trunk's processes, or the connections to a server. Processes that are gone already do no harm."""
        ...


class TrunkPlace(Protocol):
    """A place at which the trunk of a run begins, and begins again after a loss."""

    def begin(self) -> tuple[str, RunTrunk]:
        """Returns the name of a fresh trunk, which is a name of the run, too, and the trunk."""
        ...


def place_of(config: Config, start: Callable[[str], RunTrunk]) -> TrunkPlace:
    """Returns the place of a run's trunk.

    Args:
        config: Settings of the run.
        start: Starts a trunk of the engine's own, with a name.
    """
    return ServerPlace(config) if config.trunk.server else OwnPlace(start)


def find_trunk(run: str, config: Config) -> TrunkLike:
    """Returns the trunk of a run for the clients of this process, from any process that an engine has started.

    Args:
        run: Name of the trunk.
        config: Settings of the run.

    Raises:
        TrunkLost: The trunk is gone.
    """
    # Imported here: the one needs gRPC, and the other one Ray.
    if config.trunk.server:
        from fedsplit.trunk.dialing import find_remote

        return find_remote(run, config)
    from fedsplit.trunk import ray_trunks

    return ray_trunks.find_trunk(run, config)


class OwnPlace:
    """A place where the engine starts the trunk itself."""

    def __init__(self, start: Callable[[str], RunTrunk]) -> None:
        """Starts nothing yet.

        Args:
            start: Starts a trunk with a name.
        """
        self._start = start

    def begin(self) -> tuple[str, RunTrunk]:
        """See `TrunkPlace.begin`."""
        name = new_trunk_name()
        return name, self._start(name)


class ServerPlace:
    """The server that the settings name, which serves run after run."""

    def __init__(self, config: Config) -> None:
        """Asks nothing yet.

        Args:
            config: Settings of the run.
        """
        self._config = config
        self._terms: Terms | None = None
        self._owner = owner_of(config)
        self._has_begun = False

    def begin(self) -> tuple[str, RunTrunk]:
        """Begins a run at the server. After a loss, waits until the server is back.

        Raises:
            SettingError: The server does not accept the run. Nothing has been lost yet.
            TrunkLost: Nobody answers as the run starts.
            FederationFailed: After a loss, the server does not come back, or does not accept the run any more.
        """
        return self._begin_again() if self._has_begun else self._ask(_FIRST_SECONDS)

    def _begin_again(self) -> tuple[str, RunTrunk]:
        """Begins the run again after a loss."""
        server = self._config.trunk.server
        for _ in range(TRIES):
            try:
                return self._ask(self._config.trunk.wait)
            except InputError as error:
                raise FederationFailed(f"the trunk was lost, and its server does not begin again: {error}") from error
            except TrunkLost as lost:  # the server may be lost a second time while it begins
                reason = str(lost)
        raise FederationFailed(f"the trunk was lost, and the server at {server} does not come back: {reason}")

    def _ask(self, patience: float) -> tuple[str, RunTrunk]:
        """Asks the server to begin the run.

        Args:
            patience: Seconds in which the server must be reached.

        Raises:
            InputError: The server does not accept the run.
            TrunkLost: The server cannot be reached.
        """
        from fedsplit.trunk.dialing import dial_of
        from fedsplit.trunk.remote import MOST_LINES, RemoteTrunk, begin_run, finish_run
        from fedsplit.wire.grpc_calls import RefusedByServer

        server = self._config.trunk.server
        if self._terms is None:
            self._terms = terms_of(self._config)
        try:
            begun = begin_run(dial_of(self._config, patience), self._terms, self._owner)
        except (NotTrusted, RefusedByServer, MalformedValue) as error:  # the last one by another version
            raise SettingError("trunk.server", server, f"a server that accepts this run ({error})") from error
        except TrunkLost as lost:
            hint = "" if self._config.trunk.tls else "; a server with certificates needs --trunk.tls"
            raise TrunkLost(f"no trunk answers at {server} ({lost}); fedsplit serve starts one{hint}") from lost
        _check_begun(begun, server)
        self._has_begun = True
        last_dial = dial_of(self._config, _LAST_SECONDS)
        trunk = RemoteTrunk(
            begun.run,
            dial_of(self._config),
            is_operator=True,
            most_lines=max(MOST_LINES, self._config.workers),  # threads of one process play as many clients at once
            finish=lambda: finish_run(last_dial, begun.run),
        )
        return begun.run, trunk


def owner_of(config: Config) -> str:
    """Returns the identity of a run for a trunk's server: of the run's folder, so that a resumed run has the same.

    A command that is killed takes no leave of the server. By the identity, `--resume` gets the trunk at once, while
    other runs wait until the server has given up the run.

    Args:
        config: Settings of the run.

    Example:
        >>> from fedsplit.settings.documents import build
        >>> owner_of(build({"out": "runs/one"})) == owner_of(build({"out": "runs/../runs/one"}))
        True
    """
    if not config.out:
        return uuid4().hex
    place = f"{socket.gethostname()}:{Path(config.out).resolve()}"
    return hashlib.sha256(place.encode()).hexdigest()


def _check_begun(begun: Begun, server: str) -> None:
    """Checks that the server has begun the run.

    Raises:
        SettingError: The settings of the server are others, or the server serves another run.
    """
    if begun.is_busy:
        raise SettingError("trunk.server", server, "a trunk that serves no other run now")
    if begun.differences:
        allowed = f"a trunk with the settings of this run; these differ: {'; '.join(begun.differences)}"
        raise SettingError("trunk.server", server, allowed)
