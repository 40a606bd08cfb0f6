"""A round as a value: begin, collect, aggregate, evaluate, then commit or discard.

Until a round commits, nothing outside it has changed: it works on a copy of the run's state, and what it has to change
at the strategy and at the trunk is taken back by `discard`. A round that was discarded can be played again, with the
same seeds and the next attempt's number.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedsplit.durable import NotWritten
from fedsplit.events.event_types import Event, Notice, RoundAggregated
from fedsplit.federation import evaluation, training
from fedsplit.federation.aggregation_error import measure
from fedsplit.federation.attempts import Attempt
from fedsplit.federation.checkpoint import Snapshot
from fedsplit.federation.clients import FederationFailed
from fedsplit.federation.parties import Parties
from fedsplit.federation.run_state import RunState
from fedsplit.federation.training import Training
from fedsplit.scores import Score
from fedsplit.trunk.schedules import Schedule
from fedsplit.updates import Adapters, Assignment
from fedsplit.wire.transport import TrunkLost

if TYPE_CHECKING:
    from fedsplit.trunk.port import TrunkPort


class Round:
    """One attempt at one round.

    Attributes:
        number: The round, from 1.
        attempt: This attempt at the round.
        state: State of the run as this round changes it.
    """

    def __init__(self, parties: Parties, state: RunState, attempt: Attempt | None = None) -> None:
        """Changes nothing yet.

        Args:
            parties: The parties.
            state: State after the last committed round, which stays as it is.
            attempt: Attempt at this round; the first one where not given.
        """
        self._parties = parties
        self._before = state
        self._strategy = parties.aggregation.memory()
        self._assigned: Mapping[int, Assignment] = {}
        self._training = Training({})
        self._loss: float | None = None
        self._events: list[Event] = []  # reported when the round commits
        self.number = state.round + 1
        self.attempt = attempt or Attempt()
        self.state = state.copy()
        self.state.round = self.number

    def play(self) -> RunState:
        """Plays the whole round.

        Returns:
            The state after it, which is committed.
        """
        self.begin()
        self.collect()
        self.aggregate()
        self.evaluate()
        return self.commit()

    def begin(self) -> None:
        """Has the strategy decide who trains, and from what."""
        parties = self._parties
        with parties.watchdog.doing("the strategy, which chooses the clients of a round,"):
            self._assigned = parties.aggregation.assign(self.number, self.state.adapters, parties.clients)

    def collect(self) -> None:
        """Has the clients train, and the trunk with them; collects their updates."""
        self._training = training.train(self._parties, self.state, self.number, self._assigned, self.attempt)
        self._loss = self._training.loss
        self._events.append(training.event_of(self._parties, self.state, self.number, self._training))

    def aggregate(self) -> None:
        """Has the strategy make one set of adapters of all updates, which every party takes over."""
        parties, state, updates = self._parties, self.state, self._training.updates
        if not updates and not parties.aggregation.traits.idles:  # all clients rest
            state.ledger.fold(self.number, {})
            state.error = None
            return

        started = time.perf_counter()
        with parties.watchdog.doing("the strategy, which aggregates the updates of a round,"):
            result = parties.aggregation.aggregate(self.number, state.adapters, updates, self._training.replies)
        seconds = time.perf_counter() - started
        state.ledger.fold(self.number, result.folded)
        if parties.schedule.personal:
            parties.trunk.write(*state.ledger.trunk_end(result))
            parties.trunk.fold(result.folded)
        state.adapters = result.with_tensors(result.tensors)  # without the changes of base weights
        state.error = None
        if not updates:
            return

        error = measure(updates, result)
        state.error = error.overall
        self._events.append(
            RoundAggregated(
                round=self.number,
                seconds=seconds,
                error=error.overall,
                layers=error.layers,
                residual_rank=error.residual_rank,
                elapsed=state.totals.seconds,
            )
        )

    def evaluate(self) -> None:
        """Has clients measure the new adapters, in the rounds in which they do."""
        own: Mapping[int, Score] = self._training.scores
        changed = self._has_changed()
        self._training.updates, self._training.replies = [], []  # their tensors are needed no more
        if not evaluation.is_due(self._parties.config, self.number):
            self.state.stopping.skip(self.number)
            return
        found = evaluation.evaluate(self._parties, self.state, self.number, own, self.attempt)
        self._events.append(evaluation.event_of(self._parties, self.state, self.number, found))
        self.state.stopping.note(self.number, found.total.loss, changed)

    def commit(self) -> RunState:
        """Reports the round, and writes its checkpoint where one is due.

        The events come first: a run that is killed in between drops them when it goes on from the checkpoint before.

        Raises:
            FederationFailed: The state has values that are not finite.
        """
        parties, state = self._parties, self.state
        state.trunk = parties.trunk.read()
        state.moments = parties.trunk.moments()
        state.trunk_traffic = parties.trunk.status().traffic.document()
        snapshot = snapshot_of(parties, state)
        with contextlib.suppress(TrunkLost):  # the round counts all the same: another trunk begins after it
            parties.trunk.commit()
        for event in self._events:
            parties.emit(event)
        save(parties, state, snapshot)
        return state

    def refuse_steps(self) -> None:
        """Makes the trunk refuse every further step of the round, so that clients which still train end soon."""
        trunk = self._parties.trunk
        trunk.begin([])
        for client in self._assigned:
            trunk.leave(client)

    def discard(self) -> RunState:
        """Takes back what the round has changed at the strategy and at the trunk.

        Returns:
            The state after the last committed round, from which the round can be played again.
        """
        parties, before = self._parties, self._before
        parties.trunk.end_round([])
        parties.trunk.restore(before.trunk.tensors, before.moments)
        if parties.schedule.personal:
            parties.trunk.write(*before.ledger.trunk_end(before.adapters))
            if self._has_folded:
                parties.trunk.unfold()
        return self.discard_without_trunk()

    def discard_without_trunk(self) -> RunState:
        """Takes back what the round has changed at the strategy alone, as the trunk is gone.

        Returns:
            The state after the last committed round.
        """
        self._parties.aggregation.recall(self._strategy)
        if self._has_folded:
            self._before.ledger.discard(self._before.round)
        return self._before

    @property
    def _has_folded(self) -> bool:
        return self.state.ledger.last_fold == self.number

    @property
    def training_loss(self) -> float | None:
        """Mean training loss of the clients in nats; None where nobody trained."""
        return self._loss

    def _has_changed(self) -> bool:
        """Returns whether the round changed anything of the model.

        A round may change nothing: a strategy that simulates delays lets clients rest, or keeps their updates for a
        later round.
        """
        schedule, before, after = self._parties.schedule, self._before.adapters, self.state.adapters
        trunk_learns = schedule.learns and not schedule.personal  # at every step, beside the strategy
        if self._training.updates and (trunk_learns or self.state.ledger.has_personal):
            return True
        if self._has_folded:
            return True
        return any(not torch.equal(tensor, after.tensors[name]) for name, tensor in before.tensors.items())


def bring_to(trunk: TrunkPort, state: RunState, schedule: Schedule) -> None:
    """Brings a trunk that has just been started to the state after a committed round.

    Raises:
        TrunkLost: The trunk is gone.
    """
    if schedule.personal:
        for changes in state.ledger.past_changes(state.round):
            trunk.fold(changes)
    trunk.restore(state.trunk.tensors, state.moments)
    if schedule.personal:
        trunk.write(*state.ledger.trunk_end(state.adapters))
    trunk.commit()


def snapshot_of(parties: Parties, state: RunState) -> Snapshot:
    """Returns everything that a run needs to go on from a state.

    Raises:
        FederationFailed: A value is NaN or infinite.
    """
    facts, groups = state.ledger.snapshot()
    facts |= state.facts(state.trunk_traffic)
    groups |= {
        "adapters": dict(state.adapters.tensors),
        "strategy": dict(parties.aggregation.state()),
        "trunk": dict(state.trunk.tensors),
        "moments": dict(state.moments),
    }
    _check_finite(state.round, {name: groups[name] for name in ("adapters", "trunk", "moments")})
    return Snapshot(state.round, facts, groups)


def save(parties: Parties, state: RunState, snapshot: Snapshot) -> None:
    """Writes the checkpoint of a round where one is due. One that cannot be written is reported, and the run goes on.

    Args:
        parties: The parties.
        state: State after the round.
        snapshot: The same, as a checkpoint holds it.
    """
    folder, stopping = parties.folder, state.stopping
    is_last = state.round == parties.config.rounds or stopping.is_over
    if not folder.is_due(state.round, is_last, stopping.is_best):
        return
    personal = personal_of(state) if parties.config.keep_best and stopping.is_best else {}
    whole = state.ledger.everything(state.adapters, state.trunk)
    try:
        state.ledger.write_folds()
        folder.save_round(snapshot, whole, personal)
    except NotWritten as error:
        parties.emit(Notice(text=f"{parties.label(state.round)}  no checkpoint, and the run goes on: {error}"))


def personal_of(state: RunState) -> dict[int, Adapters]:
    """Returns the whole model's adapters as each client has them, for clients with adapters of their own."""
    found = {}
    for client, own in state.ledger.personal_adapters().items():
        adapters = state.adapters.with_tensors({**state.adapters.tensors, **own})
        found[client] = state.ledger.everything(adapters, state.trunk)
    return found


def _check_finite(round: int, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Makes sure that a checkpoint holds nothing from which no run can go on.

    Raises:
        FederationFailed: A value is NaN or infinite.
    """
    for group, tensors in groups.items():
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                reason = f"round {round} left NaN or infinite values in {name} ({group})"
                raise FederationFailed(f"{reason}: it is not saved, and a run can go on from the round before it")
