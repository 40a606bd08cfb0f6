"""The server's side of a run: introductions of the clients, the rounds, and the result."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsplit.corpora.shards import DataSize
from fedsplit.events.emitter import Emit
from fedsplit.events.event_types import Notice, Progress, RoundEnded, RunEnded, RunStarted
from fedsplit.events.provenance import provenance
from fedsplit.federation import evaluation
from fedsplit.federation.adapter_ledger import AdapterLedger
from fedsplit.federation.aggregation import make_aggregation
from fedsplit.federation.attempts import TRIES, Attempt, RoundLost
from fedsplit.federation.checkpoint import RunFolder, Snapshot
from fedsplit.federation.client_site import name_of_run
from fedsplit.federation.clients import Clients, FederationFailed, RollCall, has_start
from fedsplit.federation.early_stopping import EarlyStopping
from fedsplit.federation.introductions import Introduction
from fedsplit.federation.messages import Briefing, Introduce
from fedsplit.federation.model_card import model_card
from fedsplit.federation.parties import Parties, TrunkHost
from fedsplit.federation.round import bring_to, personal_of
from fedsplit.federation.round_cost import Cost
from fedsplit.federation.run_state import RunState
from fedsplit.federation.run_summary import norms_of, summarise
from fedsplit.federation.run_totals import RunTotals
from fedsplit.federation.strategy import aggregated_parts, coverage
from fedsplit.federation.supervision import GivenUp, Supervisor
from fedsplit.federation.virtual_time import VirtualTime, VirtualTotals, round_event
from fedsplit.federation.workload import Workload, workloads
from fedsplit.objects import Objects
from fedsplit.settings.config import Config
from fedsplit.settings.documents import as_document
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.trunk.status import TrunkStatus
from fedsplit.updates import Adapters, RefusedUpdate
from fedsplit.watchdog import Watchdog
from fedsplit.wire.transport import TrunkLost

if TYPE_CHECKING:
    from fedsplit.trunk.port import TrunkPort


@dataclass(frozen=True)
class Job:
    """Description of a run before an engine starts.

    Attributes:
        config: Configuration of the run.
        strategy: Strategy of ours or of Flower's.
        workloads: Bounds of the counts that clients may report, by client; None where the server does not know the
            clients' data, and the bounds come from the clients' introductions.
        folder: Folder of the run, with the checkpoint of a resumed run.
        emit: Reports the events of the run.
        started: Start of the command, by `time.perf_counter`.
        watchdog: Ends waits for user code that hangs.
    """

    config: Config
    strategy: Any
    workloads: Sequence[Workload] | None
    folder: RunFolder
    emit: Emit
    started: float
    watchdog: Watchdog


class Federation:
    """The server's side of a run, from the introductions of the clients to the summary.

    Attributes:
        stop: Set by another thread to end the run at the next look for answers.
        watchdog: Ends waits for user code that hangs.
        summary: The summary; None before the end of the run.
    """

    def __init__(self, job: Job, host: TrunkHost, threads: int) -> None:
        """Holds the parts of the run. Work begins with `run`.

        Args:
            job: The run.
            host: Owner of the trunk.
            threads: Threads of each client process.
        """
        self._job = job
        self._config = job.config
        self._host = host
        self._aggregation = make_aggregation(job.strategy, job.config)
        self._threads = threads
        self._provenance = provenance()  # now: files of the working directory may change during the run
        self.stop = threading.Event()
        self.watchdog = job.watchdog
        self.summary: dict[str, Any] | None = None
        self._virtual: VirtualTime | None = None
        self._workloads = list(job.workloads or ())
        at_sites = job.config.data.at == "site"
        self._store = name_of_run(job.folder.clients) if at_sites else str(job.folder.clients)

    @property
    def disks(self) -> Path:
        """Folder of the clients' disks."""
        return self._job.folder.clients

    @property
    def _trunk(self) -> TrunkPort:
        return self._host.trunk

    def run(self, clients: Clients) -> None:
        """Plays the remaining rounds.

        A lost round is discarded and played again, with the same seeds. After too many attempts the run ends early,
        with the result of the last committed round.

        Args:
            clients: Connection to the clients.

        Raises:
            FederationFailed: No client sent a usable answer, or the first round was given up.
            RefusedUpdate: The strategy returned an unusable value.
            Interrupted: `stop` was set.
        """
        # 1. All clients load their parts, and introduce themselves.
        supervisor = Supervisor(
            self._host,
            clients,
            self._config,
            self._job.emit,
            lambda: self._parties(clients),
        )
        state, parameters = self._meet_steadily(clients)
        if self._config.network.profile:
            self._virtual = VirtualTime(self._config, [node.name for node in clients.nodes])
            state.virtual = VirtualTotals()
        trained = {part: counts["trainable"] for part, counts in parameters.items()}
        self._job.emit(Notice(text=coverage(self._config, trained)))
        if self._config.data.stays_with_clients and state.ledger.has_personal:
            at_sites = self._config.data.at == "site"
            where = "at their sites" if at_sites else f"on their nodes, in {self._config.data.folder}"
            words = f"the adapters that clients keep for themselves stay {where}"
            self._job.emit(Notice(text=words))
        snapshot = self._job.folder.snapshot()
        self._report_start(clients, parameters, snapshot)
        for line in self._job.folder.notes:
            self._job.emit(Notice(text=line))

        # 2. The remaining rounds. A run that is given up still has the result of the last committed round.
        ended_early = ""
        try:
            state = self._begin_or_resume(supervisor, state, snapshot)
            while state.round < self._config.rounds and not state.stopping.is_over:
                state, training_loss = supervisor.play(state)
                self._announce(state, training_loss)
        except GivenUp as given_up:
            state = given_up.state
            if not state.round:
                raise FederationFailed(str(given_up)) from given_up
            ended_early = str(given_up)

        # 3. The result.
        self._leave_result(supervisor, clients, state, parameters, ended_early)

    def _parties(self, clients: Clients) -> Parties:
        """Returns the parties of the run, with the current trunk."""
        job = self._job
        at_sites = self._config.data.at == "site"
        # Only sites have base models of their own to compare.
        digests = json.dumps(dict(job.folder.content.model)) if at_sites else ""
        briefing = Briefing(
            run=json.dumps(as_document(self._config)),
            trunk=self._host.name,
            incarnation=self._trunk.status().incarnation,
            threads=self._threads,
            store=self._store,
            personal="".join(sorted(self._aggregation.traits.personal)),
            stage=Objects(job.strategy).has_stage,
            model=digests,
        )
        return Parties(
            self._config,
            briefing,
            self._trunk,
            clients,
            self._workloads,
            self._aggregation,
            job.folder,
            job.emit,
            job.watchdog,
            self._virtual,
        )

    def _meet_steadily(self, clients: Clients) -> tuple[RunState, dict[str, Any]]:
        """Collects the introductions of all clients. If the trunk is lost, the next try uses a new trunk."""
        for _ in range(TRIES - 1):
            try:
                return self._meet(clients)
            except TrunkLost as lost:
                self._job.emit(Notice(text=f"the clients are met again: {lost}", warning=True))
                self._host.renew()
                clients.abandon()
        return self._meet(clients)  # the last try: its error ends the run

    def _meet(self, clients: Clients) -> tuple[RunState, dict[str, Any]]:
        """Collects the introductions of all clients. A client without one is reported, and takes no part in the run.

        Returns:
            The state before the first round, and the counts of parameters by part.
        """
        count = self._config.clients
        self._report_loading(0)
        parties = self._parties(clients)
        introductions: dict[int, Introduction] = {}
        for done, introduction in enumerate(clients.meet(parties.briefing, count), start=1):
            self._report_loading(done)
            introductions[introduction.client] = introduction
        absent = parties.absent(range(count))
        self._trunk.status()  # raises the error of a lost trunk, which explains the failures of the clients
        # In the order of the clients, so that the choice of the first one does not depend on the order of arrival.
        present = [introduction for client, introduction in sorted(introductions.items()) if client not in absent]
        if not present:
            raise FederationFailed(f"no client could introduce itself: {next(iter(absent.values()))}")
        # Only the first client of a run sends the initial adapters unasked: they are equal at all clients.
        first = present[0]
        if not has_start(first):
            first = self._ask_for_start(clients, parties.briefing, present)
        for client, reason in absent.items():
            parties.report_failure("loading", 0, 0, client, reason)
        if self._job.workloads is None:
            sizes = {introduction.client: introduction.data for introduction in present}
            nothing = DataSize()
            of_clients = [sizes.get(client, nothing) for client in range(count)]
            # In place, since the parties of this meeting hold the same list.
            self._workloads[:] = workloads(self._config, of_clients)

        trunk = self._trunk.read()
        parts: dict[str, Adapters] = {"trunk": trunk, **first.start}
        ledger = AdapterLedger(
            self._config,
            self._aggregation.traits,
            parts,
            self._job.folder.clients,
            self._job.folder.folds,
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

    def _ask_for_start(
        self, clients: Clients, briefing: Briefing, introductions: Sequence[Introduction]
    ) -> Introduction:
        """Asks one client after the other for the initial adapters, since the first client is absent.

        Raises:
            FederationFailed: No client sends them.
        """
        for introduced in introductions:
            for answer in clients.ask([Introduce(briefing, introduced.client, wants_start=True)]):
                with contextlib.suppress(RefusedUpdate):
                    introduction = RollCall(self._config.clients).read(answer)
                    if has_start(introduction):
                        return introduction
        raise FederationFailed("no client said what training starts from")

    def _report_loading(self, done: int) -> None:
        """Reports the number of clients that have loaded their parts."""
        config = self._config
        event = Progress(phase="loading", round=0, rounds=config.rounds, done=done, of=config.clients)
        self._job.emit(event)

    def _report_start(self, clients: Clients, parameters: Mapping[str, Any], snapshot: Snapshot | None) -> None:
        """Reports the start of the run."""
        event = RunStarted(
            settings=as_document(self._config),
            versions=self._provenance["versions"],
            clients=[node.name for node in clients.nodes],
            parameters=parameters,
            aggregated_parts=aggregated_parts(self._config),
            after_round=snapshot.round if snapshot is not None else 0,
            folder=str(self._job.folder.path),
        )
        self._job.emit(event)

    def _begin_or_resume(self, supervisor: Supervisor, state: RunState, snapshot: Snapshot | None) -> RunState:
        """Measures the initial model of a new run, or restores the last committed round of a resumed run.

        Raises:
            GivenUp: The model could not be measured in several attempts.
        """
        if snapshot is not None:
            self._restore(state, snapshot)
            try:
                bring_to(self._trunk, state, SCHEDULES[self._config.trunk.schedule])
            except TrunkLost:
                supervisor.renew_trunk(state)
            self._job.emit(Notice(text=f"goes on after round {snapshot.round}  held-out loss {state.after:.4f}"))
            return state
        attempt = 0
        while True:
            try:
                # A copy, since an evaluation that is lost half-way has changed its state already.
                return self._measure(supervisor.gather(), state.copy(), attempt)
            except (TrunkLost, RoundLost) as lost:
                attempt += 1
                self._job.emit(Notice(text=f"the model is measured again: {lost}", warning=True))
                if attempt > self._config.max_failures:
                    raise GivenUp(f"the model could not be measured: {lost}", state) from lost
                if isinstance(lost, TrunkLost):
                    supervisor.renew_trunk(state)

    def _measure(self, parties: Parties, state: RunState, attempt: int) -> RunState:
        """Measures the initial model."""
        found = evaluation.evaluate(parties, state, 0, {}, Attempt(attempt))
        state.before = found.total.loss
        parties.emit(evaluation.event_of(parties, state, 0, found))
        traffic = self._trunk.status().traffic
        state.trunk_traffic = traffic.ledger()
        cost = Cost()
        cost.add_evaluation(found)
        parties.emit(cost.event(state, 0, traffic, parties.name))
        if state.virtual is not None:
            replayed = round_event(0, 0.0, parties.names, None, found.virtual)
            state.virtual.add(replayed)
            parties.emit(replayed)
        self._announce(state, None)
        return state

    def _restore(self, state: RunState, snapshot: Snapshot) -> None:
        """Restores strategy, ledger and state from a checkpoint."""
        groups = snapshot.groups
        self._aggregation.restore(groups.get("strategy", {}))
        state.ledger.restore(snapshot.round, snapshot.facts, groups)
        state.adapters = state.adapters.with_tensors(groups.get("adapters", {}))
        state.moments = groups.get("moments", {})
        state.trunk = state.trunk.with_tensors(groups.get("trunk", {}))
        state.restore(snapshot.round, snapshot.facts)

    def _announce(self, state: RunState, training_loss: float | None) -> None:
        """Reports the end of a round."""
        is_measured = state.measured == state.round
        metrics = {name: ends["after"] for name, ends in state.metrics.items()} or None
        event = RoundEnded(
            round=state.round,
            rounds=self._config.rounds,
            training_loss=training_loss,
            held_out_loss=state.after if is_measured else None,
            accuracy=state.accuracy.get("after") if is_measured else None,
            metrics=metrics if is_measured else None,
            tokens_per_second=state.totals.speed,
            virtual_elapsed=None if state.virtual is None else state.virtual.seconds,
            elapsed=state.totals.seconds,
        )
        self._job.emit(event)

    def _leave_result(
        self,
        supervisor: Supervisor,
        clients: Clients,
        state: RunState,
        parameters: Mapping[str, Any],
        ended_early: str,
    ) -> None:
        """Writes the resulting adapters, of the last or of the best round, and the summary.

        Args:
            supervisor: Starts a new trunk if the trunk is lost.
            clients: Connection to the clients, for their names.
            state: State after the last committed round.
            parameters: Counts of parameters by part.
            ended_early: Reason for an end before the last round; empty for a complete run.
        """
        trunk = self._final_status(supervisor, state)
        # The trunk is not asked again: it may die at any time, and all that is needed of it is here.
        unreported = Cost().event(
            state,
            state.round + 1,
            trunk.traffic,
            lambda client: clients.nodes[client].name,
        )
        if any(unreported.bytes.values()):  # of attempts that were given up
            self._job.emit(unreported)
        stopping = state.stopping
        folder = self._job.folder
        leaves_best = self._config.keep_best and not stopping.is_best
        if stopping.is_over or leaves_best:
            best = f"the best round was {stopping.best}, with a held-out loss of {stopping.lowest:.4f}"
            self._job.emit(Notice(text=f"ends after round {stopping.last}: {stopping.reason}; {best}"))

        if leaves_best:
            left = stopping.best
            whole, personal = folder.read_round(left)
            facts = folder.read_facts(left)  # figures of a single round in the summary are of the best round
            state = state.copy()
            state.after = stopping.lowest
            state.measured = left
            state.forgotten = facts["forgotten"]
            state.error = facts["error"]
            state.accuracy = facts["accuracy"]
            state.metrics = facts.get("metrics", {})
        else:
            left = stopping.last
            whole = state.ledger.everything(state.adapters, state.trunk)
            personal = personal_of(state)

        self.summary = {
            **summarise(self._config, state, parameters, left, trunk, ended_early),
            "adapter_norms": norms_of(whole),
            **self._provenance,
        }
        for client, adapters in personal.items():  # before the summary, which says that a run is complete
            folder.save_personal(client, adapters)
        folder.save_result(whole, model_card(self._config, self.summary))
        self._job.emit(RunEnded(summary=self.summary, folder=str(folder.path)))

    def _final_status(self, supervisor: Supervisor, state: RunState) -> TrunkStatus:
        """Returns the status of the trunk; of a new trunk if the trunk was lost after the last round."""
        try:
            return self._trunk.status()
        except TrunkLost:
            supervisor.renew_trunk(state)
            return self._trunk.status()
