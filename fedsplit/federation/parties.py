"""Everybody that a federation is played by, and the questions that they are asked together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedsplit.events.emitter import Emit
from fedsplit.events.event_types import ClientFailed, Phase
from fedsplit.federation.aggregation import Aggregation
from fedsplit.federation.checkpoint import RunFolder
from fedsplit.federation.clients import Clients, FederationFailed
from fedsplit.federation.messages import TRUNK_LOST, Briefing, Failure, Reply, Request
from fedsplit.federation.workload import Workload
from fedsplit.settings.config import Config
from fedsplit.trunk.schedules import SCHEDULES, Schedule
from fedsplit.wire.transport import TrunkLost

if TYPE_CHECKING:
    from fedsplit.trunk.port import TrunkPort

Heard = Callable[[Reply, int], None]
"""Takes a reply, and the number of answers that have arrived with it."""


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
    """

    config: Config
    briefing: Briefing
    trunk: TrunkPort
    clients: Clients
    workloads: Sequence[Workload]
    aggregation: Aggregation
    folder: RunFolder
    emit: Emit

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

    def ask(self, requests: Iterable[Request], heard: Heard, phase: Phase, round: int, attempt: int) -> None:
        """Asks clients, and hands on each reply as it arrives; clients that fail are reported at the end.

        Args:
            requests: One to each client that is asked.
            heard: Takes the replies.
            phase: Phase that the requests belong to.
            round: Round that they belong to.
            attempt: Number of earlier attempts at this round.

        Raises:
            NobodyAnswered: All clients failed.
            TrunkLost: The trunk is gone.
            FederationFailed: Nothing goes on any more.
            Interrupted: The run was asked to stop.
        """
        failures: list[Failure] = []
        count = replied = 0
        for answer in self.clients.ask(requests):
            count += 1
            if isinstance(answer, Reply):
                replied += 1
                heard(answer, count)
                continue
            failures.append(answer)
            if answer.kind == TRUNK_LOST:
                raise TrunkLost(answer.reason)
            self.trunk.leave(answer.client)

        for failure in failures:
            self.report_failure(phase, round, attempt, failure.client, failure.reason)
        if not replied:
            reason = failures[0].reason if failures else "nobody was asked"
            raise NobodyAnswered(f"no client answered: {reason}")

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
