"""The parties of a run: trunk, clients and sinks; and requests to several clients at once."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from fedsplit.events.emitter import Emit
from fedsplit.events.event_types import Cause, ClientFailed, ClientLost, ClientUnused, Phase
from fedsplit.federation.aggregation import Aggregation
from fedsplit.federation.attempts import Attempt, RoundLost
from fedsplit.federation.checkpoint import RunFolder
from fedsplit.federation.clients import Clients, FederationFailed
from fedsplit.federation.messages import CLIENT_LOST, LATE, TRUNK_LOST, Briefing, Failure, Reply, Request
from fedsplit.federation.virtual_time import VirtualTime
from fedsplit.federation.workload import Workload
from fedsplit.settings.config import Config
from fedsplit.trunk.schedules import SCHEDULES, Schedule
from fedsplit.watchdog import Watchdog
from fedsplit.wire.transport import TrunkLost

if TYPE_CHECKING:
    from fedsplit.trunk.port import TrunkPort

NAMED = 8
"""Most clients that a report of progress names: with thousands, all names at each reply would take seconds."""


@dataclass(frozen=True)
class Standing:
    """How far the requests of a phase are.

    Attributes:
        done: Number of clients that have answered or failed, or are absent from the run.
        waiting: The first clients that were asked and have not answered yet, in the order of the requests.
        failed: The last clients that have failed in this phase.
    """

    done: int
    waiting: tuple[int, ...] = ()
    failed: tuple[int, ...] = ()


Heard = Callable[[Reply, Standing], None]
"""Takes a reply, and how far the phase is, this reply included."""

MakeRequest = Callable[[int], Request]
"""Makes the request to a client. It is called when the request is sent, and again if the client begins again."""


class TrunkHost(Protocol):
    """Owner of a run's trunk, which starts a new trunk if the current one is lost.

    Attributes:
        trunk: The trunk, which may still be loading.
        name: Name by which clients find the trunk. It is also a name of the run.
    """

    @property
    def trunk(self) -> TrunkPort: ...  # noqa: D102  # above

    @property
    def name(self) -> str: ...  # noqa: D102  # above

    def renew(self) -> None:
        """Ends the current trunk, if it still runs, and starts a new one under a new name."""
        ...


class NobodyAnswered(FederationFailed):
    """Every requested client failed."""


@dataclass(frozen=True)
class Parties:
    """The parties of a federation, and the server's knowledge about them.

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
        virtual: The virtual clock; None without a network.
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
    virtual: VirtualTime | None = None

    @property
    def names(self) -> list[str]:
        """Names of all clients, by number."""
        return [node.name for node in self.clients.nodes]

    @property
    def schedule(self) -> Schedule:
        """Schedule of the trunk."""
        return SCHEDULES[self.config.trunk.schedule]

    def label(self, round: int) -> str:
        """Returns the name of a round on the screen."""
        return f"round {round}/{self.config.rounds}"

    def sender(self, client: int) -> str:
        """Returns a client's number and name, for messages."""
        return f"client {client} ({self.clients.nodes[client].name})"

    def name(self, client: int) -> str:
        """Returns a client's name."""
        return self.clients.nodes[client].name

    def absent(self, clients: Iterable[int]) -> Mapping[int, str]:
        """Returns why clients take no part in the run, for those of `clients` without a usable introduction."""
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
        """Sends requests to clients, and passes on each reply on arrival. Failures are reported at the end.

        Clients that are absent from the whole run count as answered. They were reported before the first round.

        A client whose process was lost is asked again, after the other clients, up to `TRIES` times in all.

        Args:
            clients: Numbers of the clients.
            make: Makes the request to a client.
            heard: Takes the replies.
            phase: Phase of the requests.
            round: Round of the requests.
            attempt: Attempt at the round.
            prepare_again: Makes the trunk forget the steps of a lost client in this phase. None if the trunk cannot
                forget them, so that the loss of a client means the loss of the round.

        Raises:
            NobodyAnswered: All clients failed.
            RoundLost: A client's process was lost and the trunk cannot forget the client's steps, or all clients were
                lost or late.
            TrunkLost: The trunk is gone.
            FederationFailed: The run cannot go on.
            Interrupted: The run was asked to stop.
        """
        everybody = list(clients)
        absent = self.absent(everybody)
        questions = _Questions(self, make, heard, phase, round, attempt, prepare_again, count=len(absent))
        questions.ask([client for client in everybody if client not in absent])
        for failure in questions.failures:
            self.report_failure(phase, round, attempt.number, failure.client, failure.reason)
        if not questions.replied:
            raise _nobody_answered(questions.failures, everybody_is_absent=bool(absent))

    def has_lost_trunk(self) -> bool:
        """Returns True if the trunk of the briefing is gone. A client's report that it is gone may be wrong."""
        try:
            return self.trunk.status().incarnation != self.briefing.incarnation
        except TrunkLost:
            return True

    def report_again(self, phase: Phase, round: int, attempt: Attempt, lost: Failure) -> None:
        """Reports a client that begins again after the loss of its process."""
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
        self,
        phase: Phase,
        round: int,
        attempt: int,
        client: int,
        reason: str,
        refused: bool = False,
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

    def report_unused(
        self,
        round: int,
        attempt: int,
        client: int,
        cause: Cause,
        reason: str,
    ) -> None:
        """Reports a client that does not count in the training of a round on the run's network."""
        event = ClientUnused(
            round=round,
            attempt=attempt,
            phase="training",
            client=client,
            client_name=self.name(client),
            reason=reason,
            cause=cause,
        )
        self.emit(event)


@dataclass
class _Questions:
    """Requests of one phase that are under way, and the answers so far.

    Attributes:
        parties: The parties.
        make: Makes the request to a client.
        heard: Takes the replies.
        phase: Phase of the requests.
        round: Round of the requests.
        attempt: Attempt at the round.
        prepare_again: Undoes the steps of a lost client; None if the trunk cannot.
        count: Number of clients that have answered or failed, or are absent.
        replied: Number of replies.
        failures: Failures of the clients that are not asked again.
        waiting: Clients that were asked and have not answered yet.
    """

    parties: Parties
    make: MakeRequest
    heard: Heard
    phase: Phase
    round: int
    attempt: Attempt
    prepare_again: Callable[[int], None] | None
    count: int
    replied: int = 0
    failures: list[Failure] = field(default_factory=list)
    waiting: dict[int, None] = field(default_factory=dict)  # a dict keeps the order of the clients, unlike a set

    def ask(self, clients: Sequence[int]) -> None:
        """Asks clients, and then those again whose process was lost, until each has answered or failed."""
        # With a network, the deadline is in virtual time, which is known when all have answered.
        limit = 0.0 if self.parties.virtual else self.parties.config.round_deadline
        # One deadline for all tries: a client that begins again has no more time than the others.
        until = time.monotonic() + limit if limit else None
        while clients:
            again = []
            self.waiting = dict.fromkeys(clients)
            # `map` is lazy: a request is made when the engine has room for it, so that thousands are not in memory at
            # once.
            for answer in self.parties.clients.ask(map(self.make, clients), until):
                self.waiting.pop(answer.client, None)
                if isinstance(answer, Reply):
                    self._hear(answer)
                elif self._begins_again(answer):
                    again.append(answer.client)
            for client in self.waiting:
                self.parties.trunk.leave(client)
                self.count += 1
                self.failures.append(Failure(client, LATE, f"it has not answered within {limit:g} seconds"))
            for client in again:
                assert self.prepare_again is not None
                self.prepare_again(client)
            clients = again

    def _hear(self, reply: Reply) -> None:
        """Counts a reply, and passes the reply on."""
        self.count += 1
        self.replied += 1
        waiting = tuple(itertools.islice(self.waiting, NAMED))
        failed = tuple(failure.client for failure in self.failures[-NAMED:])
        self.heard(reply, Standing(self.count, waiting, failed))

    def _begins_again(self, failure: Failure) -> bool:
        """Takes a failure, and returns True if the client is to be asked again.

        Raises:
            TrunkLost: The trunk is gone.
            RoundLost: A client's process was lost, and the trunk cannot forget the client's steps.
        """
        parties = self.parties
        client = failure.client
        # A client reports what it sees. Only a lost trunk that the server sees, too, ends the round.
        if failure.kind == TRUNK_LOST and parties.has_lost_trunk():
            raise TrunkLost(failure.reason)
        if failure.kind == CLIENT_LOST and self.prepare_again is None:
            raise RoundLost(f"the process of {parties.sender(client)} was lost: {failure.reason}", [client])
        # Nobody may wait for the client's steps, whether it begins again or not.
        parties.trunk.leave(client)
        if failure.kind == CLIENT_LOST and self.attempt.begin_again(client):
            parties.report_again(self.phase, self.round, self.attempt, failure)
            return True
        self.count += 1
        self.failures.append(failure)
        return False


def _nobody_answered(failures: Sequence[Failure], everybody_is_absent: bool) -> FederationFailed | RoundLost:
    """Returns the error for a phase without a reply: the round can be played again if processes were lost or late."""
    nobody = "all that were asked are left out of the run" if everybody_is_absent else "nobody was asked"
    reason = f"no client answered: {failures[0].reason if failures else nobody}"
    if any(failure.kind in (CLIENT_LOST, LATE) for failure in failures):
        return RoundLost(reason, [failure.client for failure in failures if failure.kind == CLIENT_LOST])
    return NobodyAnswered(reason)
