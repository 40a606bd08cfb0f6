"""Supervision: a round that is lost is discarded and played again, and a trunk that is lost is replaced."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable

from fedsplit.events.emitter import Emit
from fedsplit.events.event_types import RoundDiscarded
from fedsplit.federation.attempts import TRIES, Attempt, RoundLost
from fedsplit.federation.clients import Clients, FederationFailed
from fedsplit.federation.parties import Parties, TrunkHost
from fedsplit.federation.round import Round, bring_to
from fedsplit.federation.run_state import RunState
from fedsplit.settings.config import Config
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.wire.transport import TrunkLost


class GivenUp(Exception):
    """No further attempt is made at a round; the run ends early.

    Attributes:
        state: State after the last committed round.
    """

    def __init__(self, reason: str, state: RunState) -> None:
        """Keeps the reason, one line for the reader."""
        super().__init__(reason)
        self.state = state


class Supervisor:
    """Plays rounds until they are committed.

    Attributes:
        gather: Returns the parties of the run, with the trunk that it has now.
    """

    def __init__(
        self,
        host: TrunkHost,
        clients: Clients,
        config: Config,
        emit: Emit,
        gather: Callable[[], Parties],
    ) -> None:
        """Plays nothing yet.

        Args:
            host: The place where the trunk lives.
            clients: Way to the clients.
            config: Configuration of the run.
            emit: Reports the events of the run.
            gather: Returns the parties of the run, with the trunk that it has now.
        """
        self._host = host
        self._clients = clients
        self._config = config
        self._emit = emit
        self.gather = gather

    def play(self, state: RunState) -> tuple[RunState, float | None]:
        """Plays the next round, as often as it is lost.

        Args:
            state: State after the last committed round.

        Returns:
            The state after the round, and the clients' mean training loss in nats; None where nobody trained.

        Raises:
            GivenUp: Too many attempts were lost.
        """
        attempt = Attempt()
        lost_clients: Counter[int] = Counter()
        while True:
            round = None  # `gather` asks the trunk, which may be lost before there is a round
            try:
                round = Round(self.gather(), state, attempt)
                return round.play(), round.training_loss
            except (TrunkLost, RoundLost) as lost:
                state = self._take_back(state, round, lost)
                if isinstance(lost, RoundLost):
                    lost_clients.update(lost.clients)
                # A client whose process dies in every attempt would take every attempt with it.
                excluded = frozenset(client for client, times in lost_clients.items() if times >= TRIES)
                attempt = self._next_attempt(state, attempt, lost, excluded)

    def _next_attempt(
        self, state: RunState, attempt: Attempt, lost: TrunkLost | RoundLost, excluded: frozenset[int]
    ) -> Attempt:
        """Reports a lost attempt at the round after a state, and returns the next one.

        Raises:
            GivenUp: There is none.
        """
        again = attempt.number < self._config.max_failures
        event = RoundDiscarded(
            round=state.round + 1,
            rounds=self._config.rounds,
            attempt=attempt.number,
            reason=str(lost),
            again=again,
            elapsed=state.totals.seconds,
        )
        self._emit(event)
        if not again:
            times = f"{attempt.number + 1} times" if attempt.number else "once"
            raise GivenUp(f"round {state.round + 1} was lost {times}: {lost}", state)
        return Attempt(attempt.number + 1, excluded)

    def _take_back(self, state: RunState, round: Round | None, lost: TrunkLost | RoundLost) -> RunState:
        """Brings all parties back to the last committed round.

        Args:
            state: State after the last committed round.
            round: The round that is discarded; None where the trunk was lost before it was made.
            lost: Error that ended the round.

        Returns:
            The state after the last committed round.
        """
        if isinstance(lost, RoundLost) and round is not None:
            with contextlib.suppress(TrunkLost):  # then the trunk is replaced, as if it had been lost first
                round.refuse_steps()
                self._clients.abandon()
                return round.discard()
        if round is not None:
            round.discard_without_trunk()
        self.renew_trunk(state)
        return state

    def renew_trunk(self, state: RunState) -> None:
        """Starts another trunk, and brings it to the state after the last committed round.

        Raises:
            FederationFailed: The new trunk is lost again and again.
        """
        reason = ""
        for _ in range(TRIES):
            # The old trunk ends first: clients that wait for it then fail, and are soon done with what they were asked.
            self._host.renew()
            state.take_over_traffic()
            try:
                self._clients.abandon()
                bring_to(self._host.trunk, state, SCHEDULES[self._config.trunk.schedule])
            except TrunkLost as lost:
                reason = str(lost)
            else:
                return
        raise FederationFailed(f"the trunk was started {TRIES} times, and was lost each time: {reason}")
