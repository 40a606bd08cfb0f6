"""The training of a round: clients train by their assignments, and the server collects the updates."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from fedsplit.events.event_types import Cause, Notice, Progress, RoundTrained
from fedsplit.federation import quarantine
from fedsplit.federation.adapter_codec import AdapterCodec
from fedsplit.federation.attempts import TRIES, Attempt, RoundLost
from fedsplit.federation.client_order import groups_of, takes_turns
from fedsplit.federation.clients import FederationFailed
from fedsplit.federation.messages import ADAPTERS, Reply, Train
from fedsplit.federation.parties import NobodyAnswered, Parties, Standing
from fedsplit.federation.replies import Control, memory_of, sample_of, to_update, without_tensors
from fedsplit.federation.run_state import RunState
from fedsplit.federation.virtual_time import PhaseTraffic, TrainingTime
from fedsplit.optimization.rates import last_rate
from fedsplit.scores import Score
from fedsplit.trunk.copies import Copy
from fedsplit.trunk.status import RoundCounts
from fedsplit.updates import Adapters, Assignment, ClientUpdate, RefusedUpdate
from fedsplit.wire.encoded import MalformedPacket


@dataclass
class Training:
    """Outcome of a round's training.

    Attributes:
        assigned: Assignments by client.
        updates: Usable updates, in the order of the clients.
        replies: The clients' replies in the same order, without tensors.
        counts: Counts of the trunk: steps, forwards, backwards, …
        copies: Copies of the trunk's adapter under `copies`, by client with a usable update.
        tokens: Number of trained tokens.
        seconds: Time from the first request to the end of the trunk's round.
        virtual: The training in virtual time; None without a network.
    """

    assigned: Mapping[int, Assignment]
    updates: list[ClientUpdate] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    counts: RoundCounts = field(default_factory=RoundCounts)
    copies: Mapping[int, Copy] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0
    virtual: TrainingTime | None = None

    @property
    def uncounted(self) -> int:
        """Number of clients that did not count on the run's network, none of them for a failure."""
        return 0 if self.virtual is None else len(self.virtual.unused) + len(self.virtual.unavailable)

    @property
    def loss(self) -> float | None:
        """Mean training loss of the clients in nats; None if no client trained."""
        return mean([update.loss for update in self.updates]) if self.updates else None

    @property
    def scores(self) -> dict[int, Score]:
        """Score of each client on the client's sample, right after local training."""
        return {reply.client: sample_of(reply) for reply in self.replies}


def train(
    parties: Parties, state: RunState, round: int, assigned: Mapping[int, Assignment], attempt: Attempt
) -> Training:
    """Lets clients train, group by group, and collects the updates.

    Args:
        parties: The parties.
        state: State of the round. Ledger and totals are brought up to date.
        round: The round.
        assigned: Assignments by client.
        attempt: Attempt at the round.

    Raises:
        FederationFailed: No update can be used.
        RoundLost: Too few updates can be used, or a client's process was lost under a schedule whose trunk cannot
            forget the steps of one client.
    """
    started = time.perf_counter()
    ledger = state.ledger
    trunk = parties.trunk
    schedule = parties.schedule
    if schedule.personal:
        starts = {client: ledger.trunk_start(client, one) for client, one in assigned.items()}
        trunk.assign(starts)
    training = _Collection(parties, state, round, assigned, attempt, started).collect()

    # The trunk keeps the state of clients with a usable update alone, as the server does below.
    training.counts = trunk.end_round([update.client for update in training.updates])
    if training.counts.unusable:
        reason = "the trunk made no step, after which its adapter would not be finite: --train.lr is too large"
        parties.emit(Notice(text=f"{parties.label(round)}  {reason} ({parties.config.train.lr:g})"))
    if schedule.personal:
        training.updates = ledger.with_copies(training.updates, training.copies, training.assigned)
    for update in training.updates:
        ledger.accept(update.client, round, training.assigned[update.client])

    training.seconds = time.perf_counter() - started
    totals = state.totals
    totals.tokens += training.tokens
    totals.asked += len(assigned)
    totals.failed += len(assigned) - len(training.updates) - training.uncounted
    totals.train_seconds += training.seconds
    totals.client_memory = max([totals.client_memory, *map(memory_of, training.replies)])
    return training


class _Collection:
    """Requests and replies of one round of training."""

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
        self._assigned = dict(assigned)
        config = parties.config
        self._codec: AdapterCodec | None = None
        if config.adapter.codec != "raw":
            self._codec = AdapterCodec(config.adapter.codec, config.seed, state.ledger.rule.crossing)
        self._sent: dict[int, dict[str, Tensor]] = {}  # encoded adapters by client
        self._attempt = attempt
        self._started = started
        virtual = parties.virtual
        self._unavailable = {} if virtual is None else virtual.unavailable(round, sorted(assigned))
        self._unused: Mapping[int, tuple[Cause, str]] = {}
        self._traffic = PhaseTraffic()
        left_out = attempt.excluded | parties.absent(assigned).keys() | self._unavailable.keys()
        playing = [client for client in assigned if client not in left_out]
        self._groups = groups_of(parties.config, round, playing, lambda client: parties.workloads[client].steps)
        self._alternates = len(self._groups) > 1 or takes_turns(parties.config)
        self._used: dict[int, tuple[Reply, ClientUpdate]] = {}
        self._tokens = 0

    def collect(self) -> Training:
        """Sends the requests group by group, and returns the outcome."""
        parties = self._parties
        self._show(Standing(0))
        for client in sorted(self._assigned.keys() & self._attempt.excluded):
            reason = f"its process was lost {TRIES} times"
            parties.report_failure("training", self._round, self._attempt.number, client, reason)
        for client, reason in self._unavailable.items():
            parties.report_unused(self._round, self._attempt.number, client, "unavailable", reason)
        if parties.virtual is not None:
            parties.trunk.take_trace()  # of an attempt that was discarded

        reason = "no client sent anything that can be used"
        for group in self._groups:
            if self._alternates:
                # From here on, the trunk refuses steps of all clients outside of the group, such as a late client of
                # the group before.
                parties.trunk.begin(group)
            try:
                parties.ask(
                    group, self._request, self._heard, "training", self._round, self._attempt, self._prepare_again
                )
            except NobodyAnswered as failed:  # clients of later groups may answer
                reason = str(failed)
        # With a quorum, the round is lost below instead, and played again.
        if self._groups and not self._used and not parties.config.quorum:
            raise FederationFailed(reason)

        virtual = self._replay()
        # Before the quorum is checked, since a misfit does not count.
        copies = parties.trunk.copies(sorted(self._used)) if parties.schedule.personal else {}
        self._leave_out_misfits(copies)
        self._check_quorum()

        # In the order of the clients, not of arrival: sums of floats depend on the order.
        replies = []
        updates = []
        for client in sorted(self._used):
            reply, update = self._used[client]
            replies.append(reply)
            updates.append(update)
        return Training(self._assigned, updates, replies, copies=copies, tokens=self._tokens, virtual=virtual)

    def _replay(self) -> TrainingTime | None:
        """Replays the training in virtual time, and leaves out the updates that are late or surplus."""
        parties = self._parties
        if parties.virtual is None:
            return None
        phases = self._traffic.phases(parties.trunk.take_trace(), self._round)
        unavailable = sorted(self._unavailable)
        found = parties.virtual.training(phases, self._round, self._used.keys(), unavailable)
        self._unused = found.unused
        for client, (cause, reason) in found.unused.items():
            parties.report_unused(self._round, self._attempt.number, client, cause, reason)
            self._drop(client)
        return found

    def _drop(self, client: int) -> None:
        """Leaves out a client that has sent an update."""
        self._parties.trunk.leave(client)
        _, update = self._used.pop(client)
        # The tokens of the round are those of the updates that count.
        self._tokens -= update.tokens

    def _leave_out_misfits(self, copies: Mapping[int, Copy]) -> None:
        """Reports and leaves out clients whose updates differ too much from the rest.

        Args:
            copies: Copies of the trunk's adapter by client, under `copies`.
        """
        parties = self._parties
        misfits = {}
        for client, copy in copies.items():
            steps = parties.workloads[client].steps
            if copy.steps not in (None, steps):
                misfits[client] = f"trained its copy of the trunk for {copy.steps} steps, not {steps}"

        # Each rule looks only at clients that have passed the earlier rules: a misfit would move the comparison.
        updates = [update for _, update in self._used.values() if update.client not in misfits]
        if parties.config.max_update_norm:
            norms = {}
            for update in updates:
                norms[update.client] = self._norm_of(update, copies.get(update.client))
            misfits |= quarantine.too_large(norms, parties.config.max_update_norm)
        if parties.briefing.stage:
            updates = [update for update in updates if update.client not in misfits]
            misfits |= quarantine.without_their_share(updates)

        for client, reason in sorted(misfits.items()):
            words = f"{parties.sender(client)} {reason}"
            parties.report_failure("training", self._round, self._attempt.number, client, words, refused=True)
            self._drop(client)

    def _norm_of(self, update: ClientUpdate, copy: Copy | None) -> float:
        """Returns the norm of a client's change, including the change of the client's copy of the trunk's adapter."""
        assert update.given is not None
        own = update.adapters.tensors, update.given.tensors
        if copy is None:
            return quarantine.change_norm(own)
        start = self._state.ledger.trunk_start(update.client, self._assigned[update.client])
        return quarantine.change_norm(own, (copy.adapters.tensors, start.tensors))

    def _check_quorum(self) -> None:
        """Checks that enough of the assigned clients have sent a usable update.

        Raises:
            RoundLost: Too few clients have.
        """
        asked = len(self._assigned) - len(self._unavailable)
        used = len(self._used) + len(self._unused)  # a lost round would be lost again: virtual time stays the same
        needed = math.ceil(self._parties.config.quorum * asked)
        if used < needed:
            raise RoundLost(f"{used} of {asked} clients have sent an update that can be used, {needed} are needed")

    @property
    def _prepare_again(self) -> Callable[[int], None] | None:
        """Function that makes the trunk forget a client's steps; None if the steps have changed the shared adapter."""
        schedule = self._parties.schedule
        if schedule.personal:
            return self._assign_again
        return None if schedule.learns else _do_nothing

    def _assign_again(self, client: int) -> None:
        """Sets the client's copy of the trunk's adapter back to the start of the round."""
        start = self._state.ledger.trunk_start(client, self._assigned[client])
        self._parties.trunk.assign_again(client, start)

    def _request(self, client: int) -> Train:
        """Returns the request to train, with the adapters that the client does not hold."""
        ledger = self._state.ledger
        tensors = self._tensors_for(client)
        assignment = self._assigned[client]
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
            tensors=tensors,
            task=task,
            drawn=assignment.drawn,
            # Without factors, no tensor tells the rank.
            rank=assignment.adapters.largest_rank or self._parties.config.lora.rank_of(client),
            kept=self._parties.folder.rounds_needed(client),
        )
        self._state.totals.count("adapter_down", client, request.nbytes)
        self._traffic.down[client] = request.nbytes
        return request

    def _tensors_for(self, client: int) -> Mapping[str, Tensor]:
        """Returns the adapters that a client does not hold; with a codec, all that cross, encoded.

        The assignment then has the decoded values, which the client starts from.
        """
        assignment = self._assigned[client]
        if self._codec is None:
            return self._state.ledger.lacking(client, assignment)
        if client not in self._sent:  # a client that is asked again gets the same bytes
            # All of them: a tensor that the client holds exactly would be another one than the decoded tensor, and
            # which tensors a client holds is forgotten in a resumed run.
            crossing = self._state.ledger.crossing(assignment)
            self._sent[client] = self._codec.encode_values(crossing, client, self._round)
            decoded = self._codec.decode_values(self._sent[client], client, self._round)
            adapters = assignment.adapters
            known = adapters.with_tensors({**adapters.tensors, **decoded})
            self._assigned[client] = replace(assignment, adapters=known)
        return self._sent[client]

    def _decoded(self, reply: Reply, given: Adapters) -> Reply:
        """Returns a reply with decoded adapters. What cannot be decoded makes the reply malformed."""
        sent = reply.tensors.get(ADAPTERS)
        if self._codec is None or sent is None:
            return reply
        try:
            tensors = self._codec.decode_changes(sent, given.tensors, reply.client, self._round)
        except MalformedPacket as error:
            return replace(reply, malformed=str(error))
        return replace(reply, tensors={**reply.tensors, ADAPTERS: tensors})

    def _heard(self, reply: Reply, standing: Standing) -> None:
        """Takes a reply."""
        parties = self._parties
        client = reply.client
        # Counted whether the update can be used or not: the bytes have crossed.
        self._state.totals.count("adapter_up", client, reply.nbytes)
        self._traffic.up[client] = reply.nbytes
        update = self._accepted(reply)
        # A client that has answered is not waited for, even if it did not say goodbye to the trunk. To a trunk in
        # another process, clients send packets only.
        if update is None or self._alternates or parties.config.trunk.server:
            parties.trunk.leave(client)
        if update is None:
            return
        self._used[client] = without_tensors(reply), update
        self._tokens += update.tokens
        self._show(standing)

    def _show(self, standing: Standing) -> None:
        """Reports the progress of the training."""
        parties = self._parties
        losses = [update.loss for _, update in self._used.values()]
        event = Progress(
            phase="training",
            round=self._round,
            rounds=parties.config.rounds,
            done=len(losses),
            of=len(self._assigned),
            loss=mean(losses) if losses else None,
            tokens_per_second=self._tokens / (time.perf_counter() - self._started),
            waiting=[parties.name(client) for client in standing.waiting],
            failed=[parties.name(client) for client in standing.failed],
        )
        parties.emit(event)

    def _accepted(self, reply: Reply) -> ClientUpdate | None:
        """Returns a reply as an update with a weight. An unusable reply is reported, and gives None."""
        parties = self._parties
        client = reply.client
        ledger = self._state.ledger
        assignment = self._assigned[client]
        given = ledger.given(assignment)
        returned = ledger.rule.returned(given.tensors, assignment.task)
        sender = parties.sender(client)
        try:
            reply = self._decoded(reply, given)
            update = to_update(reply, given, returned, sender, parties.workloads[client], self._control_of(client))
        except RefusedUpdate as refused:
            reason = str(refused)
            parties.report_failure("training", self._round, self._attempt.number, client, reason, refused=True)
            return None
        return replace(update, weight=_weight(update, parties.config.weights))

    def _control_of(self, client: int) -> Control:
        """Returns the rule for tensors beside the adapters in a client's update."""
        if self._assigned[client].task.control is not None:
            return "required"
        return "optional" if self._parties.briefing.stage else "none"


def _do_nothing(client: int) -> None:
    """Forgets nothing. The trunk does not learn, so there is nothing to forget."""


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
    rates = _learning_rates(parties, round, training)
    now = {"resident_memory": status.resident_memory, "over_socket": status.over_socket}
    return RoundTrained(
        round=round,
        loss=training.loss,
        clients={parties.name(update.client): update.loss for update in training.updates},
        router_aux_loss=mean(router_losses) if router_losses else None,
        learning_rate=_learning_rate(parties, round, rates),
        client_learning_rates={parties.name(client): rate for client, rate in rates.items()},
        tokens=training.tokens,
        seconds=training.seconds,
        trunk={**training.counts.document(), **now},
        elapsed=state.totals.seconds,
    )


def _learning_rates(parties: Parties, round: int, training: Training) -> dict[int, float]:
    """Returns the learning rate of the last local step of a round, by client. Clients without a step are left out."""
    train = parties.config.train
    rounds = parties.config.rounds
    rates = {}
    for update in training.updates:
        steps = parties.workloads[update.client].steps if train.epochs else train.steps
        if steps:
            rates[update.client] = last_rate(train, steps, round, rounds)
    return rates


def _learning_rate(parties: Parties, round: int, rates: Mapping[int, float]) -> float | None:
    """Returns the learning rate of a round's last local step.

    Under epochs, clients make different numbers of steps, and their learning rates differ. The result is then the mean
    over the clients; None if no client trained.
    """
    train = parties.config.train
    if not train.epochs:
        return last_rate(train, train.steps, round, parties.config.rounds)
    return mean(list(rates.values())) if rates else None


def mean(values: Sequence[float]) -> float:
    """Returns the mean of at least one value."""
    return sum(values) / len(values)
