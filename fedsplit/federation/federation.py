"""The server's run: it meets the clients, plays the rounds, and leaves the result."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedsplit.events.emitter import Emit
from fedsplit.events.event_types import Notice, Progress, RoundDiscarded, RoundEnded, RunEnded, RunStarted
from fedsplit.events.versions import versions
from fedsplit.federation import evaluation
from fedsplit.federation.adapter_ledger import AdapterLedger
from fedsplit.federation.aggregation import make_aggregation
from fedsplit.federation.attempts import TRIES, Attempt, RoundLost
from fedsplit.federation.checkpoint import RunFolder, Snapshot
from fedsplit.federation.clients import Clients, FederationFailed
from fedsplit.federation.early_stopping import EarlyStopping
from fedsplit.federation.messages import Briefing
from fedsplit.federation.parties import Parties, TrunkHost
from fedsplit.federation.round import Round, bring_to, personal_of
from fedsplit.federation.run_state import RunState
from fedsplit.federation.run_totals import RunTotals
from fedsplit.federation.strategy import aggregated_parts, coverage
from fedsplit.federation.training import mean
from fedsplit.federation.workload import Workload
from fedsplit.objects import Objects
from fedsplit.settings.config import Config
from fedsplit.settings.documents import as_document
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.trunk.status import TrunkStatus
from fedsplit.updates import Adapters
from fedsplit.watchdog import Watchdog
from fedsplit.wire.transport import TrunkLost

if TYPE_CHECKING:
    from fedsplit.trunk.port import TrunkPort


@dataclass(frozen=True)
class Job:
    """Everything that is known of a run before an engine starts.

    Attributes:
        config: Configuration of the run.
        strategy: Strategy of ours or of Flower's.
        workloads: Bounds of the counts that clients may report, by client.
        folder: Folder of the run; holds the checkpoint of a run that goes on.
        emit: Reports the events of the run.
        started: Start of the command, by `time.perf_counter`.
        watchdog: Ends waits for code of the user's that hangs.
    """

    config: Config
    strategy: Any
    workloads: Sequence[Workload]
    folder: RunFolder
    emit: Emit
    started: float
    watchdog: Watchdog


class _GivenUp(Exception):
    """No further attempt is made at a round; the run ends early.

    Attributes:
        state: State after the last committed round.
    """

    def __init__(self, reason: str, state: RunState) -> None:
        super().__init__(reason)
        self.state = state


class Federation:
    """The server's run, from meeting the clients to the summary.

    Attributes:
        stop: Set from another thread to end the run at the next look at what has arrived.
        watchdog: Ends waits for code of the user's that hangs.
        summary: The result, once there is one.
    """

    def __init__(self, job: Job, host: TrunkHost, threads: int) -> None:
        """Nothing happens before `run`.

        Args:
            job: The run.
            host: The place where the trunk lives.
            threads: Threads of each client process.
        """
        self._job = job
        self._config = job.config
        self._host = host
        self._aggregation = make_aggregation(job.strategy, job.config)
        self._threads = threads
        self.stop = threading.Event()
        self.watchdog = job.watchdog
        self.summary: dict[str, Any] | None = None

    @property
    def _trunk(self) -> TrunkPort:
        return self._host.trunk

    def run(self, clients: Clients) -> None:
        """Plays all rounds that are left.

        A round that is lost is discarded and played again, with the same seeds. After too many attempts the run ends
        early, and leaves the result of the last round that was committed.

        Args:
            clients: Way to the clients.

        Raises:
            FederationFailed: No client answered, or no answer could be used, or the first round was given up.
            RefusedUpdate: The strategy returned something that cannot be used.
            Interrupted: `stop` was set.
        """
        state, parameters = self._meet_steadily(clients)
        trained = {part: counts["trainable"] for part, counts in parameters.items()}
        self._job.emit(Notice(text=coverage(self._config, trained)))
        snapshot = self._job.folder.snapshot()
        self._report_start(clients, parameters, snapshot)
        for line in self._job.folder.notes:
            self._job.emit(Notice(text=line))
        ended_early = ""
        try:
            state = self._begin_or_resume(clients, state, snapshot)
            while state.round < self._config.rounds and not state.stopping.is_over:
                state = self._play_round(clients, state)
        except _GivenUp as given_up:
            state = given_up.state
            if not state.round:
                raise FederationFailed(str(given_up)) from given_up
            ended_early = str(given_up)
        self._leave_result(clients, state, parameters, ended_early)

    def _parties(self, clients: Clients) -> Parties:
        """Returns the parties of the run, with the trunk that it has now."""
        job = self._job
        briefing = Briefing(
            run=json.dumps(as_document(self._config)),
            trunk=self._host.name,
            incarnation=self._trunk.status().incarnation,
            threads=self._threads,
            store=str(job.folder.clients),
            personal="".join(sorted(self._aggregation.traits.personal)),
            stage=Objects(job.strategy).has_stage,
        )
        return Parties(
            self._config,
            briefing,
            self._trunk,
            clients,
            job.workloads,
            self._aggregation,
            job.folder,
            job.emit,
            job.watchdog,
        )

    def _play_round(self, clients: Clients, state: RunState) -> RunState:
        """Plays the next round, as often as it is lost.

        Returns:
            The state after it.

        Raises:
            _GivenUp: Too many attempts were lost.
        """
        attempt = Attempt()
        lost_clients: Counter[int] = Counter()
        while True:
            round = None
            try:
                round = Round(self._parties(clients), state, attempt)
                state = round.play()
            except (TrunkLost, RoundLost) as lost:
                state = self._take_back(clients, state, round, lost)
                if isinstance(lost, RoundLost):
                    lost_clients.update(lost.clients)
                excluded = frozenset(client for client, times in lost_clients.items() if times >= TRIES)
                attempt = self._next_attempt(state, attempt, lost, excluded)
            else:
                self._announce(state, round.training_loss)
                return state

    def _next_attempt(
        self, state: RunState, attempt: Attempt, lost: TrunkLost | RoundLost, excluded: frozenset[int]
    ) -> Attempt:
        """Reports a lost attempt at the round after a state, and returns the next one.

        Raises:
            _GivenUp: There is none.
        """
        again = attempt.number < self._config.max_failures and not (isinstance(lost, RoundLost) and not lost.may_help)
        event = RoundDiscarded(
            round=state.round + 1,
            rounds=self._config.rounds,
            attempt=attempt.number,
            reason=str(lost),
            again=again,
            elapsed=state.totals.seconds,
        )
        self._job.emit(event)
        if not again:
            raise _GivenUp(f"round {state.round + 1} was lost {attempt.number + 1} times: {lost}", state)
        return Attempt(attempt.number + 1, excluded)

    def _take_back(
        self, clients: Clients, state: RunState, round: Round | None, lost: TrunkLost | RoundLost
    ) -> RunState:
        """Brings all parties back to the last committed round.

        Args:
            clients: Way to the clients.
            state: State after the last committed round.
            round: The round that is discarded; None where the trunk was lost before it was made.
            lost: Error that ended the round.

        Returns:
            The state after the last committed round.
        """
        if isinstance(lost, RoundLost) and round is not None:
            with contextlib.suppress(TrunkLost):
                round.refuse_steps()
                clients.abandon()
                return round.discard()
        if round is not None:
            round.discard_without_trunk()
        self._renew_trunk(clients, state)
        return state

    def _renew_trunk(self, clients: Clients, state: RunState) -> None:
        """Starts another trunk, and brings it to the state after the last committed round.

        Raises:
            FederationFailed: The new trunk is lost again and again.
        """
        reason = ""
        for _ in range(TRIES):
            self._host.renew()
            state.take_over_traffic()
            try:
                clients.abandon()
                bring_to(self._trunk, state, SCHEDULES[self._config.trunk.schedule])
            except TrunkLost as lost:
                reason = str(lost)
            else:
                return
        raise FederationFailed(f"the trunk was started {TRIES} times, and was lost each time: {reason}")

    def _meet_steadily(self, clients: Clients) -> tuple[RunState, dict[str, Any]]:
        """Has all clients introduce themselves, with another trunk where the first one is lost."""
        for _ in range(TRIES - 1):
            try:
                return self._meet(clients)
            except TrunkLost as lost:
                self._job.emit(Notice(text=f"the clients are met again: {lost}"))
                self._host.renew()
                clients.abandon()
        return self._meet(clients)

    def _meet(self, clients: Clients) -> tuple[RunState, dict[str, Any]]:
        """Has all clients introduce themselves.

        Returns:
            The state before the first round, and the counts of parameters by part.
        """
        count = self._config.clients
        self._report_loading(0)
        first = None
        briefing = self._parties(clients).briefing
        for done, introduction in enumerate(clients.meet(briefing, count), start=1):
            self._report_loading(done)
            if introduction.client == 0:
                first = introduction
        if first is None:
            raise FederationFailed("the first client did not say what training starts from")

        trunk = self._trunk.read()
        parts: dict[str, Adapters] = {"trunk": trunk, **first.start}
        ledger = AdapterLedger(
            self._config, self._aggregation.traits, parts, self._job.folder.clients, self._job.folder.folds
        )
        state = RunState(
            adapters=ledger.start,
            trunk=trunk,
            moments=self._trunk.moments(),
            ledger=ledger,
            totals=RunTotals(self._job.started),
            stopping=EarlyStopping(self._config.patience, self._config.min_delta),
        )
        parameters = {
            "bottom": first.parameters["bottom"],
            "trunk": self._trunk.status().parameters,
            "top": first.parameters["top"],
        }
        return state, parameters

    def _report_loading(self, done: int) -> None:
        """Reports how many clients have loaded their parts."""
        config = self._config
        self._job.emit(Progress(phase="loading", round=0, rounds=config.rounds, done=done, of=config.clients))

    def _report_start(self, clients: Clients, parameters: Mapping[str, Any], snapshot: Snapshot | None) -> None:
        """Reports that all clients are there."""
        event = RunStarted(
            settings=as_document(self._config),
            versions=versions(),
            clients=[node.name for node in clients.nodes],
            parameters=parameters,
            aggregated_parts=aggregated_parts(self._config),
            after_round=snapshot.round if snapshot is not None else 0,
            folder=str(self._job.folder.path),
        )
        self._job.emit(event)

    def _begin_or_resume(self, clients: Clients, state: RunState, snapshot: Snapshot | None) -> RunState:
        """Measures the model as it is before the first round, or brings back the last committed round.

        Raises:
            _GivenUp: The model could not be measured in several attempts.
        """
        if snapshot is not None:
            self._restore(state, snapshot)
            try:
                bring_to(self._trunk, state, SCHEDULES[self._config.trunk.schedule])
            except TrunkLost:
                self._renew_trunk(clients, state)
            self._job.emit(Notice(text=f"goes on after round {snapshot.round}  held-out loss {state.after:.4f}"))
            return state
        attempt = 0
        while True:
            try:
                return self._measure(clients, state.copy(), attempt)
            except (TrunkLost, RoundLost) as lost:
                attempt += 1
                self._job.emit(Notice(text=f"the model is measured again: {lost}"))
                if attempt > self._config.max_failures:
                    raise _GivenUp(f"the model could not be measured: {lost}", state) from lost
                if isinstance(lost, TrunkLost):
                    self._renew_trunk(clients, state)

    def _measure(self, clients: Clients, state: RunState, attempt: int) -> RunState:
        """Measures the model as it is before the first round."""
        parties = self._parties(clients)
        found = evaluation.evaluate(parties, state, 0, {}, Attempt(attempt))
        state.before = found.total.loss
        parties.emit(evaluation.event_of(parties, state, 0, found))
        state.trunk_traffic = self._trunk.status().traffic.document()
        self._announce(state, None)
        return state

    def _restore(self, state: RunState, snapshot: Snapshot) -> None:
        """Brings strategy, ledger and state back to the end of a committed round."""
        groups = snapshot.groups
        self._aggregation.restore(groups.get("strategy", {}))
        state.ledger.restore(snapshot.round, snapshot.facts, groups)
        state.adapters = state.adapters.with_tensors(groups.get("adapters", {}))
        state.moments = groups.get("moments", {})
        state.trunk = state.trunk.with_tensors(groups.get("trunk", {}))
        state.restore(snapshot.round, snapshot.facts)

    def _announce(self, state: RunState, training_loss: float | None) -> None:
        """Reports that a round is over."""
        event = RoundEnded(
            round=state.round,
            rounds=self._config.rounds,
            training_loss=training_loss,
            held_out_loss=state.after,
            accuracy=state.accuracy.get("after"),
            metrics={name: ends["after"] for name, ends in state.metrics.items()} or None,
            tokens_per_second=state.totals.speed,
            elapsed=state.totals.seconds,
        )
        self._job.emit(event)

    def _leave_result(self, clients: Clients, state: RunState, parameters: Mapping[str, Any], ended_early: str) -> None:
        """Writes the adapters that the run leaves, of its last round or of its best, and the summary.

        Args:
            clients: Way to the clients.
            state: State after the last committed round.
            parameters: Counts of parameters by part.
            ended_early: Reason why the run ends before its last round; empty for a run that is complete.
        """
        trunk = self._final_status(clients, state)
        stopping, folder = state.stopping, self._job.folder
        leaves_best = self._config.keep_best and not stopping.is_best
        if stopping.is_over or leaves_best:
            best = f"the best round was {stopping.best}, with a held-out loss of {stopping.lowest:.4f}"
            self._job.emit(Notice(text=f"ends after round {stopping.last}: {stopping.reason}; {best}"))

        if leaves_best:
            left = stopping.best
            whole, personal = folder.read_round(left)
            facts = folder.read_facts(left)  # every figure of the summary that is of one round is of this one
            state = state.copy()
            state.after = stopping.lowest
            state.forgotten, state.error, state.accuracy = facts["forgotten"], facts["error"], facts["accuracy"]
            state.metrics = facts.get("metrics", {})
        else:
            left = stopping.last
            whole = state.ledger.everything(state.adapters, state.trunk)
            personal = personal_of(state)

        self.summary = self._summarise(state, parameters, left, trunk, ended_early)
        for client, adapters in personal.items():  # before the summary, which says that a run is complete
            folder.save_personal(client, adapters)
        folder.save_result(whole)
        self._job.emit(RunEnded(summary=self.summary, folder=str(folder.path)))

    def _final_status(self, clients: Clients, state: RunState) -> TrunkStatus:
        """Returns the status of the trunk; of another one where the trunk was lost after the last round."""
        try:
            return self._trunk.status()
        except TrunkLost:
            self._renew_trunk(clients, state)
            return self._trunk.status()

    def _summarise(
        self, state: RunState, parameters: Mapping[str, Any], left: int, trunk: TrunkStatus, ended_early: str
    ) -> dict[str, Any]:
        """Returns the content of summary.json.

        Args:
            state: State at the end of the run.
            parameters: Counts of parameters by part.
            left: Round whose adapters the run leaves.
            trunk: Status of the trunk.
            ended_early: Reason why the run ends before its last round; empty for a run that is complete.
        """
        config = self._config
        return {
            "seed": config.seed,
            "model": config.model,
            "clients": config.clients,
            "rounds": config.rounds,
            "last_round": state.stopping.last,
            "best_round": state.stopping.best,
            "adapter_round": left,
            "complete": not ended_early,
            "ended": ended_early or state.stopping.reason,
            "strategy": config.strategy,
            "aggregated_parts": aggregated_parts(config),
            "schedule": config.trunk.schedule,
            "cut": config.cut,
            "parameters": dict(parameters),
            "eval_loss": {"before": state.before, "after": state.after},
            **({"accuracy": state.accuracy} if state.accuracy else {}),
            **({"metrics": state.metrics} if state.metrics else {}),
            "forgotten": mean(list(state.forgotten.values())) if state.forgotten else None,
            "aggregation_error": state.error,
            **state.totals.summary(trunk.traffic.document()),
            "peak_memory": {"client": state.totals.client_memory, "trunk": trunk.peak_memory},
        }
