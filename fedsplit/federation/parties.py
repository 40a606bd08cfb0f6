"""Everybody that a federation is played by, and the questions that they are asked together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fedsplit.events.emitter import Emit
from fedsplit.events.event_types import ClientFailed, ClientLost, Phase
from fedsplit.federation.aggregation import Aggregation
from fedsplit.federation.attempts import Attempt, RoundLost
from fedsplit.federation.checkpoint import RunFolder
from fedsplit.federation.clients import Clients, FederationFailed
from fedsplit.federation.messages import CLIENT_LOST, LATE, TRUNK_LOST, Briefing, Failure, Reply, Request
from fedsplit.federation.workload import Workload
from fedsplit.settings.config import Config
from fedsplit.trunk.schedules import SCHEDULES, Schedule
from fedsplit.watchdog import Watchdog
from fedsplit.wire.transport import TrunkLost

if TYPE_CHECKING:
    from fedsplit.trunk.port import TrunkPort

Heard = Callable[[Reply, int], None]
"""Takes a reply, and the number of clients that have answered with it."""

MakeRequest = Callable[[int], Request]
"""Makes the request to a client; called as the request is sent, once more where the client begins again."""


class TrunkHost(Protocol):
    """The place where a run's trunk lives; starts another trunk where the first one is lost.

    Attributes:
        trunk: The trunk, which may still be loading.
        name: Name by which clients find the trunk; names the run, too.
    """

    @property
    def trunk(self) -> TrunkPort: ...  # noqa: D102  # above

    @property
    def name(self) -> str: ...  # noqa: D102  # above

    def renew(self) -> None:
        """Ends the trunk, if there is anything left to end, and starts another one under another name."""
        ...


class NobodyAnswered(FederationFailed):
    """All clients that were asked failed."""


@dataclass(frozen=True)
class Parties:
    """The parties of a federation, and what the server knows of them.

    Attributes:
        config: Configuration of the run.
        briefing: Facts that every request carries.
        trunk: The trunk.
        clients: The clients.
        workloads: Bounds of the counts that clients may report, by client.
        aggregation: The strategy at work.
        folder: Folder of the run.
        emit: Reports the events of the run.
        watchdog: Ends waits for code of the user's that hangs.
    """

    config: Config
    briefing: Briefing
    trunk: TrunkPort
    clients: Clients
    workloads: Sequence[Workload]
    aggregation: Aggregation
    folder: RunFolder
    emit: Emit
    watchdog: Watchdog

    @property
    def schedule(self) -> Schedule:
        """Schedule of the trunk."""
        return SCHEDULES[self.config.trunk.schedule]

    def label(self, round: int) -> str:
        """Returns the words by which a round is shown."""
        return f"round {round}/{self.config.rounds}"

    def sender(self, client: int) -> str:
        """Returns a client's number and name, for messages."""
        return f"client {client} ({self.clients.nodes[client].name})"

    def name(self, client: int) -> str:
        """Returns a client's name."""
        return self.clients.nodes[client].name

    def absent(self, clients: Iterable[int]) -> Mapping[int, str]:
        """Returns the reason of each client, of some, that takes no part in the run as it has not introduced itself."""
        reasons = {client: self.clients.nodes[client].absent for client in sorted(clients)}
        return {client: reason for client, reason in reasons.items() if reason}

    def ask(
        self,
        clients: Iterable[int],
        make: MakeRequest,
        heard: Heard,
        phase: Phase,
        round: int,
        attempt: Attempt,
        prepare_again: Callable[[int], None] | None,
    ) -> None:
        """Asks clients, and hands on each reply as it arrives; clients that fail are reported at the end.

        Clients that are absent from the whole run count as answered. They were reported before the first round.

        A client whose process was lost is asked again, after the others, up to `TRIES` times in all.

        Args:
            clients: Numbers of the clients that are asked.
            make: Makes the request to a client.
            heard: Takes the replies.
            phase: Phase that the requests belong to.
            round: Round that they belong to.
            attempt: Attempt at this round.
            prepare_again: Makes the trunk forget what a lost client has done in this phase. None where the trunk
                cannot forget it, so that a lost client means a lost round.

        Raises:
            NobodyAnswered: All clients failed.
            RoundLost: A client's process was lost and its steps cannot be forgotten, or all clients were lost or late.
            TrunkLost: The trunk is gone.
            FederationFailed: Nothing goes on any more.
            Interrupted: The run was asked to stop.
        """
        everybody = list(clients)
        absent = self.absent(everybody)
        asked = [client for client in everybody if client not in absent]
        failures: list[Failure] = []
        count = len(absent)
        replied = 0
        limit = self.config.round_deadline
        until = time.monotonic() + limit if limit else None
        while asked:
            again = []
            silent = dict.fromkeys(asked)
            for answer in self.clients.ask(map(make, asked), until):
                client = answer.client
                silent.pop(client, None)
                if isinstance(answer, Reply):
                    count += 1
                    replied += 1
                    heard(answer, count)
                    continue
                if answer.kind == TRUNK_LOST and self._has_lost_trunk():
                    raise TrunkLost(answer.reason)
                if answer.kind == CLIENT_LOST and prepare_again is None:
                    raise RoundLost(f"the process of {self.sender(client)} was lost: {answer.reason}", [client])
                self.trunk.leave(client)
                if answer.kind == CLIENT_LOST and attempt.begin_again(client):
                    self._report_again(phase, round, attempt, answer)
                    again.append(client)
                    continue
                count += 1
                failures.append(answer)
            for client in silent:
                self.trunk.leave(client)
                failures.append(Failure(client, LATE, f"it has not answered within {limit:g} seconds"))
            for client in again:
                assert prepare_again is not None
                prepare_again(client)
            asked = again

        for failure in failures:
            self.report_failure(phase, round, attempt.number, failure.client, failure.reason)
        if replied:
            return
        nobody = "all that were asked are left out of the run" if absent else "nobody was asked"
        reason = f"no client answered: {failures[0].reason if failures else nobody}"
        if any(failure.kind in (CLIENT_LOST, LATE) for failure in failures):
            raise RoundLost(reason, [failure.client for failure in failures if failure.kind == CLIENT_LOST])
        raise NobodyAnswered(reason)

    def _has_lost_trunk(self) -> bool:
        """Returns True if the trunk that clients were told of is gone: a client may also say so that is wrong."""
        try:
            return self.trunk.status().incarnation != self.briefing.incarnation
        except TrunkLost:
            return True

    def _report_again(self, phase: Phase, round: int, attempt: Attempt, lost: Failure) -> None:
        """Reports a client that begins again, since its process was lost."""
        event = ClientLost(
            round=round,
            attempt=attempt.number,
            phase=phase,
            client=lost.client,
            client_name=self.name(lost.client),
            reason=lost.reason,
        )
        self.emit(event)

    def report_failure(
        self, phase: Phase, round: int, attempt: int, client: int, reason: str, refused: bool = False
    ) -> None:
        """Reports a client that failed, or whose reply cannot be used."""
        event = ClientFailed(
            round=round,
            attempt=attempt,
            phase=phase,
            client=client,
            client_name=self.name(client),
            reason=reason,
            refused=refused,
        )
        self.emit(event)
