"""A round as a transaction: begin, collect, aggregate, evaluate, and then commit or discard.

A round works on a copy of the run's state. Changes of the strategy and of the trunk are undone by `discard`. A
discarded round can be played again, with the same seeds and the next attempt's number.
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
from fedsplit.federation.round_cost import Cost
from fedsplit.federation.run_state import RunState
from fedsplit.federation.training import Training
from fedsplit.federation.virtual_time import round_event
from fedsplit.network.times import PhaseTime
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
        attempt: The attempt at the round.
        state: Copy of the run's state, which the round changes.
    """

    def __init__(self, parties: Parties, state: RunState, attempt: Attempt | None = None) -> None:
        """Changes nothing yet.

        Args:
            parties: The parties.
            state: State after the last committed round, which stays unchanged.
            attempt: Attempt at the round; None for the first attempt.
        """
        self._parties = parties
        self._before = state
        # Taken before the strategy is asked for anything, since assigning and aggregating change its memory.
        self._strategy = parties.aggregation.memory()
        self._assigned: Mapping[int, Assignment] = {}
        self._training = Training({})
        self._loss: float | None = None
        self._cost = Cost()
        self._evaluated: PhaseTime | None = None
        self._events: list[Event] = []  # reported when the round commits
        self.number = state.round + 1
        self.attempt = attempt or Attempt()
        self.state = state.copy()
        self.state.round = self.number

    def play(self) -> RunState:
        """Plays the whole round.

        Returns:
            The committed state.
        """
        self.begin()
        self.collect()
        self.aggregate()
        self.evaluate()
        return self.commit()

    def begin(self) -> None:
        """Asks the strategy for the clients that train, and for their adapters."""
        parties = self._parties
        with parties.watchdog.doing("the strategy, which chooses the clients of a round,"):
            self._assigned = parties.aggregation.assign(self.number, self.state.adapters, parties.clients)

    def collect(self) -> None:
        """Lets clients and trunk train, and collects the updates."""
        self._training = training.train(self._parties, self.state, self.number, self._assigned, self.attempt)
        self._loss = self._training.loss
        self._cost.add_training(self._training)
        event = training.event_of(self._parties, self.state, self.number, self._training)
        self._events.append(event)

    def aggregate(self) -> None:
        """Lets the strategy aggregate the updates, and brings ledger and trunk up to date."""
        parties = self._parties
        state = self.state
        updates = self._training.updates
        if not updates and not parties.aggregation.traits.idles:  # all clients rest
            # Without this, the changes of an earlier round would be sent again.
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
        self._cost.seconds["aggregation"] = time.perf_counter() - started  # the trunk's part of it, too
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
        """Lets clients measure the new adapters, if the round is to be evaluated."""
        own: Mapping[int, Score] = self._training.scores
        # Before the updates are dropped, since the answer depends on them.
        changed = self._has_changed()
        # The tensors are needed no more, and an evaluation takes memory, too.
        self._training.updates = []
        self._training.replies = []
        if not evaluation.is_due(self._parties.config, self.number):
            self.state.stopping.skip(self.number)
            return
        found = evaluation.evaluate(self._parties, self.state, self.number, own, self.attempt)
        self._events.append(evaluation.event_of(self._parties, self.state, self.number, found))
        self._cost.add_evaluation(found)
        self._evaluated = found.virtual
        self.state.stopping.note(self.number, found.total.loss, changed)

    def commit(self) -> RunState:
        """Reports the round, and writes a checkpoint if one is due.

        Events are reported before the checkpoint. If the run is killed in between, the resumed run drops the events.

        Raises:
            FederationFailed: The state has values that are not finite.
        """
        parties, state = self._parties, self.state
        # Read before anything is reported: if the trunk is lost at this point, the round is still lost as a whole.
        state.trunk = parties.trunk.read()
        state.moments = parties.trunk.moments()
        traffic = parties.trunk.status().traffic
        state.trunk_traffic = traffic.ledger()
        state.totals.traffic.update(parties.clients.take_shipped())
        self._events.append(self._cost.event(state, self.number, traffic, parties.name))
        if state.virtual is not None:
            before = state.virtual.seconds
            replayed = round_event(self.number, before, parties.names, self._training.virtual, self._evaluated)
            state.virtual.add(replayed)
            self._events.append(replayed)
        snapshot = snapshot_of(parties, state)
        with contextlib.suppress(TrunkLost):  # the round still counts: a new trunk starts from its state
            parties.trunk.commit()
        for event in self._events:
            parties.emit(event)
        save(parties, state, snapshot)
        return state

    def refuse_steps(self) -> None:
        """Makes the trunk refuse further steps of the round, so that clients stop training soon."""
        trunk = self._parties.trunk
        trunk.begin([])  # an empty group: the trunk refuses the steps of all clients
        for client in self._assigned:
            trunk.leave(client)

    def discard(self) -> RunState:
        """Undoes the changes of the strategy and of the trunk.

        Returns:
            The state after the last committed round, from which the round can be played again.
        """
        parties, before = self._parties, self._before
        parties.trunk.end_round([])  # nobody has finished, so the trunk keeps nothing of the attempt
        parties.trunk.restore(before.trunk.tensors, before.moments)
        if parties.schedule.personal:
            parties.trunk.write(*before.ledger.trunk_end(before.adapters))
            if self._has_folded:
                parties.trunk.unfold()  # from copies, to the bit
        return self.discard_without_trunk()

    def discard_without_trunk(self) -> RunState:
        """Undoes the changes of the strategy only, since the trunk is gone.

        Returns:
            The state after the last committed round.
        """
        self._parties.aggregation.recall(self._strategy)
        if self._has_folded:
            # Clients may have written the changes to their log already, which all copies of the ledger share.
            self._before.ledger.discard(self._before.round)
        return self._before

    @property
    def _has_folded(self) -> bool:
        return self.state.ledger.last_fold == self.number

    @property
    def training_loss(self) -> float | None:
        """Mean training loss of the clients in nats; None if no client trained."""
        return self._loss

    def _has_changed(self) -> bool:
        """Returns True if the round changed the model.

        A strategy that simulates delays may leave the model unchanged: clients rest, or their updates count in a later
        round.
        """
        schedule = self._parties.schedule
        before = self._before.adapters
        after = self.state.adapters
        trunk_learns = schedule.learns and not schedule.personal  # at every step, beside the strategy
        if self._training.updates and (trunk_learns or self.state.ledger.has_personal):
            return True
        if self._has_folded:
            return True
        return any(not torch.equal(tensor, after.tensors[name]) for name, tensor in before.tensors.items())


def bring_to(trunk: TrunkPort, state: RunState, schedule: Schedule) -> None:
    """Brings a new trunk to the state after a committed round.

    Raises:
        TrunkLost: The trunk is gone.
    """
    if schedule.personal:
        for changes in state.ledger.past_changes(state.round):
            trunk.fold(changes)  # round by round: the sum of floats depends on the order
    trunk.restore(state.trunk.tensors, state.moments)
    if schedule.personal:
        trunk.write(*state.ledger.trunk_end(state.adapters))
    trunk.commit()


def snapshot_of(parties: Parties, state: RunState) -> Snapshot:
    """Returns a state in the form of a checkpoint.

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
    """Writes the checkpoint of a round, if one is due. If writing fails, the failure is reported and the run goes on.

    Args:
        parties: The parties.
        state: State after the round.
        snapshot: The state in the form of a checkpoint.
    """
    folder = parties.folder
    stopping = state.stopping
    is_last = state.round == parties.config.rounds or stopping.is_over
    if not folder.is_due(state.round, is_last, stopping.is_best):
        return
    personal = personal_of(state) if parties.config.keep_best and stopping.is_best else {}
    whole = state.ledger.everything(state.adapters, state.trunk)
    try:
        state.ledger.write_folds()
        folder.save_round(snapshot, whole, personal)
    except NotWritten as error:
        text = f"{parties.label(state.round)}  no checkpoint, and the run goes on: {error}"
        parties.emit(Notice(text=text, warning=True))


def personal_of(state: RunState) -> dict[int, Adapters]:
    """Returns the whole model's adapters by client, for clients with personal tensors."""
    found = {}
    for client, own in state.ledger.personal_adapters().items():
        adapters = state.adapters.with_tensors({**state.adapters.tensors, **own})
        found[client] = state.ledger.everything(adapters, state.trunk)
    return found


def _check_finite(round: int, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Checks that all values of a checkpoint are finite. No run can go on from NaN.

    Raises:
        FederationFailed: A value is NaN or infinite.
    """
    for group, tensors in groups.items():
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                reason = f"round {round} left NaN or infinite values in {name} ({group})"
                raise FederationFailed(f"{reason}: it is not saved, and a run can go on from the round before it")
