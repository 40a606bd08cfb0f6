"""The training of a round: clients train from their assignments, and their updates are collected."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedsplit.events.event_types import Notice, Progress, RoundTrained
from fedsplit.federation import quarantine
from fedsplit.federation.attempts import TRIES, Attempt, RoundLost
from fedsplit.federation.client_order import groups_of, takes_turns
from fedsplit.federation.clients import FederationFailed
from fedsplit.federation.messages import Reply, Train
from fedsplit.federation.parties import NobodyAnswered, Parties
from fedsplit.federation.replies import Control, memory_of, sample_of, to_update, without_tensors
from fedsplit.federation.run_state import RunState
from fedsplit.optimization.rates import last_rate
from fedsplit.scores import Score
from fedsplit.trunk.registry import Copy
from fedsplit.trunk.status import RoundCounts
from fedsplit.updates import Assignment, ClientUpdate, RefusedUpdate


@dataclass
class Training:
    """Outcome of a round's training.

    Attributes:
        assigned: Assignments by client.
        updates: Updates that can be used, by client.
        replies: Replies that the updates were read from, without their tensors.
        counts: Counts of the trunk: steps, forwards, backwards, …
        copies: Copies of the trunk's adapter by client, under `copies`, of the clients with an update.
        tokens: Tokens that were trained on.
        seconds: Time from the first request to the end of the trunk's round.
    """

    assigned: Mapping[int, Assignment]
    updates: list[ClientUpdate] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    counts: RoundCounts = field(default_factory=RoundCounts)
    copies: Mapping[int, Copy] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0

    @property
    def loss(self) -> float | None:
        """Mean training loss of the clients in nats; None where nobody trained."""
        return mean([update.loss for update in self.updates]) if self.updates else None

    @property
    def scores(self) -> dict[int, Score]:
        """Score of each client on its sample, right after its own steps."""
        return {reply.client: sample_of(reply) for reply in self.replies}


def train(
    parties: Parties, state: RunState, round: int, assigned: Mapping[int, Assignment], attempt: Attempt
) -> Training:
    """Has clients train, group by group, and collects their updates.

    Args:
        parties: The parties.
        state: State of the round; its ledger and sums are brought up to date.
        round: The round.
        assigned: Assignments by client.
        attempt: Attempt at this round.

    Raises:
        FederationFailed: No update can be used.
        RoundLost: Too few updates can be used, or a client's process was lost under a schedule whose trunk cannot
            forget the steps of one client.
    """
    started = time.perf_counter()
    ledger, trunk, schedule = state.ledger, parties.trunk, parties.schedule
    if schedule.personal:
        trunk.assign({client: ledger.trunk_start(client, one) for client, one in assigned.items()})
    training = _Collection(parties, state, round, assigned, attempt, started).collect()

    training.counts = trunk.end_round([update.client for update in training.updates])
    if training.counts.unusable:
        reason = "the trunk made no step, after which its adapter would not be finite: --train.lr is too large"
        parties.emit(Notice(text=f"{parties.label(round)}  {reason} ({parties.config.train.lr:g})"))
    if schedule.personal:
        training.updates = ledger.with_copies(training.updates, training.copies, assigned)
    for update in training.updates:
        ledger.accept(update.client, round, assigned[update.client])

    training.seconds = time.perf_counter() - started
    totals = state.totals
    totals.tokens += training.tokens
    totals.asked += len(assigned)
    totals.failed += len(assigned) - len(training.updates)
    totals.train_seconds += training.seconds
    totals.client_memory = max([totals.client_memory, *map(memory_of, training.replies)])
    return training


class _Collection:
    """The requests of one round of training, and the replies as they arrive."""

    def __init__(
        self,
        parties: Parties,
        state: RunState,
        round: int,
        assigned: Mapping[int, Assignment],
        attempt: Attempt,
        started: float,
    ) -> None:
        self._parties = parties
        self._state = state
        self._round = round
        self._assigned = assigned
        self._attempt = attempt
        self._started = started
        left_out = attempt.excluded | parties.absent(assigned).keys()
        playing = [client for client in assigned if client not in left_out]
        self._groups = groups_of(parties.config, round, playing, lambda client: parties.workloads[client].steps)
        self._alternates = len(self._groups) > 1 or takes_turns(parties.config)
        self._used: dict[int, tuple[Reply, ClientUpdate]] = {}
        self._tokens = 0

    def collect(self) -> Training:
        """Asks all groups, one after the other."""
        parties = self._parties
        self._show()
        for client in sorted(self._assigned.keys() & self._attempt.excluded):
            reason = f"its process was lost {TRIES} times"
            parties.report_failure("training", self._round, self._attempt.number, client, reason)
        reason = "no client sent anything that can be used"
        for group in self._groups:
            if self._alternates:
                parties.trunk.begin(group)
            try:
                parties.ask(
                    group, self._request, self._heard, "training", self._round, self._attempt, self._prepare_again
                )
            except NobodyAnswered as failed:  # clients of other groups may
                reason = str(failed)
        if self._groups and not self._used and not parties.config.quorum:
            raise FederationFailed(reason)
        copies = parties.trunk.copies(sorted(self._used)) if parties.schedule.personal else {}
        self._leave_out_misfits(copies)
        self._check_quorum()
        in_order = [self._used[client] for client in sorted(self._used)]
        replies = [reply for reply, _ in in_order]
        updates = [update for _, update in in_order]
        return Training(self._assigned, updates, replies, copies=copies, tokens=self._tokens)

    def _leave_out_misfits(self, copies: Mapping[int, Copy]) -> None:
        """Leaves out the clients whose updates differ too much from those of the others, and names them.

        Args:
            copies: Copies of the trunk's adapter by client, under `copies`.
        """
        parties = self._parties
        updates = [update for _, update in self._used.values()]
        misfits = {
            client: f"trained its copy of the trunk for {copy.steps} steps, not {parties.workloads[client].steps}"
            for client, copy in copies.items()
            if copy.steps not in (None, parties.workloads[client].steps)
        }
        updates = [update for update in updates if update.client not in misfits]
        if parties.config.max_update_norm:
            norms = {update.client: self._norm_of(update, copies.get(update.client)) for update in updates}
            misfits |= quarantine.too_large(norms, parties.config.max_update_norm)
        if parties.briefing.stage:
            misfits |= quarantine.without_their_share([one for one in updates if one.client not in misfits])
        for client, reason in sorted(misfits.items()):
            words = f"{parties.sender(client)} {reason}"
            parties.report_failure("training", self._round, self._attempt.number, client, words, refused=True)
            parties.trunk.leave(client)
            _, update = self._used.pop(client)
            self._tokens -= update.tokens

    def _norm_of(self, update: ClientUpdate, copy: Copy | None) -> float:
        """Returns the norm of a client's change, that of its copy of the trunk's adapter included."""
        assert update.given is not None
        own = update.adapters.tensors, update.given.tensors
        if copy is None:
            return quarantine.change_norm(own)
        start = self._state.ledger.trunk_start(update.client, self._assigned[update.client])
        return quarantine.change_norm(own, (copy.adapters.tensors, start.tensors))

    def _check_quorum(self) -> None:
        """Makes sure that enough of the clients that were asked have sent an update.

        Raises:
            RoundLost: Too few have.
        """
        asked, used = len(self._assigned), len(self._used)
        needed = math.ceil(self._parties.config.quorum * asked)
        if used < needed:
            raise RoundLost(f"{used} of {asked} clients have sent an update that can be used, {needed} are needed")

    @property
    def _prepare_again(self) -> Callable[[int], None] | None:
        """Makes the trunk forget the steps of one client; None where they have changed what others train from."""
        schedule = self._parties.schedule
        if schedule.personal:
            return self._assign_again
        return None if schedule.learns else _do_nothing

    def _assign_again(self, client: int) -> None:
        start = self._state.ledger.trunk_start(client, self._assigned[client])
        self._parties.trunk.assign_again(client, start)

    def _request(self, client: int) -> Train:
        """Returns the request to train: the task, and those adapters that the client does not have."""
        ledger, assignment = self._state.ledger, self._assigned[client]
        task = assignment.task
        if task.control is not None:
            task = replace(task, control=ledger.rule.crosses(task.control))
        request = Train(
            self._parties.briefing,
            client,
            self._round,
            self._attempt.of(client),
            accepted=ledger.accepted.get(client, 0),
            folded=ledger.last_fold,
            folds=ledger.folds_at_clients,
            discarded=ledger.discarded,
            tensors=ledger.lacking(client, assignment),
            task=task,
            drawn=assignment.drawn,
            rank=assignment.adapters.largest_rank or self._parties.config.lora.rank_of(client),
            kept=self._parties.folder.rounds_needed(client),
        )
        self._state.totals.traffic["adapter_down"] += request.nbytes
        return request

    def _heard(self, reply: Reply, _: int) -> None:
        """Takes a reply."""
        parties = self._parties
        client = reply.client
        self._state.totals.traffic["adapter_up"] += reply.nbytes
        update = self._accepted(reply)
        # A client that has answered is not waited for, even if it did not say goodbye to the trunk.
        if update is None or self._alternates:
            parties.trunk.leave(client)
        if update is None:
            return
        self._used[client] = without_tensors(reply), update
        self._tokens += update.tokens
        self._show()

    def _show(self) -> None:
        """Reports how many clients have trained."""
        losses = [update.loss for _, update in self._used.values()]
        self._parties.emit(
            Progress(
                phase="training",
                round=self._round,
                rounds=self._parties.config.rounds,
                done=len(losses),
                of=len(self._assigned),
                loss=mean(losses) if losses else None,
                tokens_per_second=self._tokens / (time.perf_counter() - self._started),
            )
        )

    def _accepted(self, reply: Reply) -> ClientUpdate | None:
        """Returns a reply as an update with its weight; one that cannot be used is named and left out."""
        parties, client = self._parties, reply.client
        given = self._state.ledger.given(self._assigned[client])
        returned = self._state.ledger.rule.returned(given.tensors, self._assigned[client].task)
        try:
            update = to_update(
                reply, given, returned, parties.sender(client), parties.workloads[client], self._control_of(client)
            )
        except RefusedUpdate as refused:
            parties.report_failure("training", self._round, self._attempt.number, client, str(refused), refused=True)
            return None
        return replace(update, weight=_weight(update, parties.config.weights))

    def _control_of(self, client: int) -> Control:
        """Returns whether a client has to send a control variate, or may send tensors of the strategy's stage."""
        if self._assigned[client].task.control is not None:
            return "required"
        return "optional" if self._parties.briefing.stage else "none"


def _do_nothing(client: int) -> None:
    """Forgets nothing, where the trunk has learnt nothing."""


def _weight(update: ClientUpdate, by: str) -> float:
    """Returns the weight of an update in an average.

    Args:
        update: The update.
        by: "examples", "tokens" or "equal".
    """
    if by == "examples":
        return float(update.examples)
    if by == "tokens":
        return float(update.tokens)
    return 1.0 if update.examples else 0.0


def event_of(parties: Parties, state: RunState, round: int, training: Training) -> RoundTrained:
    """Returns the event that reports a round's training."""
    router_losses = [update.router_loss for update in training.updates if update.router_loss is not None]
    status = parties.trunk.status()
    now = {"resident_memory": status.resident_memory, "over_socket": status.over_socket}
    return RoundTrained(
        round=round,
        loss=training.loss,
        clients={parties.name(update.client): update.loss for update in training.updates},
        router_aux_loss=mean(router_losses) if router_losses else None,
        learning_rate=_learning_rate(parties, round, training),
        tokens=training.tokens,
        seconds=training.seconds,
        trunk={**training.counts.document(), **now},
        elapsed=state.totals.seconds,
    )


def _learning_rate(parties: Parties, round: int, training: Training) -> float | None:
    """Returns the learning rate of a round's last local step.

    Under epochs clients make different numbers of steps, so that their rates differ, too. Their mean is returned then;
    None where nobody trained.
    """
    train, rounds = parties.config.train, parties.config.rounds
    if not train.epochs:
        return last_rate(train, train.steps, round, rounds)
    steps = [parties.workloads[update.client].steps for update in training.updates]
    rates = [last_rate(train, count, round, rounds) for count in steps if count]
    return mean(rates) if rates else None


def mean(values: Sequence[float]) -> float:
    """Returns the mean of some values, of which there is one at least."""
    return sum(values) / len(values)
