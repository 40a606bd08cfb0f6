"""The server's run: it meets the clients, plays the rounds, and leaves the result."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedsplit.events.emitter import Emit
from fedsplit.events.event_types import Notice, Progress, RoundEnded, RunEnded, RunStarted
from fedsplit.events.versions import versions
from fedsplit.federation import evaluation
from fedsplit.federation.adapter_ledger import AdapterLedger
from fedsplit.federation.aggregation import make_aggregation
from fedsplit.federation.checkpoint import RunFolder, Snapshot
from fedsplit.federation.clients import Clients, FederationFailed
from fedsplit.federation.early_stopping import EarlyStopping
from fedsplit.federation.messages import Briefing
from fedsplit.federation.parties import Parties
from fedsplit.federation.round import Round, personal_of
from fedsplit.federation.run_state import RunState
from fedsplit.federation.run_totals import RunTotals
from fedsplit.federation.strategy import aggregated_parts, coverage
from fedsplit.federation.training import mean
from fedsplit.federation.workload import Workload
from fedsplit.objects import Objects
from fedsplit.settings.config import Config
from fedsplit.settings.documents import as_document
from fedsplit.updates import Adapters

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
    """

    config: Config
    strategy: Any
    workloads: Sequence[Workload]
    folder: RunFolder
    emit: Emit
    started: float


class Federation:
    """The server's run, from meeting the clients to the summary.

    Attributes:
        stop: Set from another thread to end the run at the next look at what has arrived.
        summary: The result, once there is one.
    """

    def __init__(self, job: Job, trunk: TrunkPort, trunk_name: str, threads: int) -> None:
        """Nothing happens before `run`.

        Args:
            job: The run.
            trunk: The trunk.
            trunk_name: Name by which clients find the trunk; names the run, too.
            threads: Threads of each client process.
        """
        self._job = job
        self._config = job.config
        self._trunk = trunk
        self._aggregation = make_aggregation(job.strategy, job.config)
        self._trunk_name = trunk_name
        self._threads = threads
        self.stop = threading.Event()
        self.summary: dict[str, Any] | None = None

    def run(self, clients: Clients) -> None:
        """Plays all rounds that are left.

        Args:
            clients: Way to the clients.

        Raises:
            FederationFailed: No client answered, or no answer could be used.
            RefusedUpdate: The strategy returned something that cannot be used.
            Interrupted: `stop` was set.
        """
        parties = self._gather(clients)
        state, parameters = self._meet(parties)
        trained = {part: counts["trainable"] for part, counts in parameters.items()}
        self._job.emit(Notice(text=coverage(self._config, trained)))
        snapshot = self._job.folder.snapshot()
        self._report_start(parties, parameters, snapshot)
        for line in self._job.folder.notes:
            self._job.emit(Notice(text=line))
        state = self._begin_or_resume(parties, state, snapshot)
        while state.round < self._config.rounds and not state.stopping.is_over:
            round = Round(parties, state)
            state = round.play()
            self._announce(state, round.training_loss)
        self._leave_result(parties, state, parameters)

    def _gather(self, clients: Clients) -> Parties:
        job = self._job
        briefing = Briefing(
            run=json.dumps(as_document(self._config)),
            trunk=self._trunk_name,
            incarnation=self._trunk.status().incarnation,
            threads=self._threads,
            store=str(job.folder.clients),
            personal="".join(sorted(self._aggregation.traits.personal)),
            stage=Objects(job.strategy).has_stage,
        )
        return Parties(
            self._config, briefing, self._trunk, clients, job.workloads, self._aggregation, job.folder, job.emit
        )

    def _meet(self, parties: Parties) -> tuple[RunState, dict[str, Any]]:
        """Has all clients introduce themselves.

        Returns:
            The state before the first round, and the counts of parameters by part.
        """
        count = self._config.clients
        self._report_loading(0)
        first = None
        for done, introduction in enumerate(parties.clients.meet(parties.briefing, count), start=1):
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

    def _report_start(self, parties: Parties, parameters: Mapping[str, Any], snapshot: Snapshot | None) -> None:
        """Reports that all clients are there."""
        event = RunStarted(
            settings=as_document(self._config),
            versions=versions(),
            clients=[parties.name(client) for client in range(self._config.clients)],
            parameters=parameters,
            aggregated_parts=aggregated_parts(self._config),
            after_round=snapshot.round if snapshot is not None else 0,
            folder=str(self._job.folder.path),
        )
        self._job.emit(event)

    def _begin_or_resume(self, parties: Parties, state: RunState, snapshot: Snapshot | None) -> RunState:
        """Measures the model as it is before the first round, or brings back the last committed round."""
        if snapshot is not None:
            return self._restore(parties, state, snapshot)
        found = evaluation.evaluate(parties, state, 0, {})
        state.before = found.total.loss
        parties.emit(evaluation.event_of(parties, state, 0, found))
        self._announce(state, None)
        return state

    def _restore(self, parties: Parties, state: RunState, snapshot: Snapshot) -> RunState:
        """Brings every party back to the end of a committed round."""
        groups, schedule = snapshot.groups, parties.schedule
        self._aggregation.restore(groups.get("strategy", {}))
        for changes in state.ledger.restore(snapshot.round, snapshot.facts, groups):
            if schedule.personal:
                self._trunk.fold(changes)
        state.adapters = state.adapters.with_tensors(groups.get("adapters", {}))
        state.moments = groups.get("moments", {})
        state.trunk = state.trunk.with_tensors(groups.get("trunk", {}))
        self._trunk.restore(groups.get("trunk", {}), state.moments)
        if schedule.personal:
            self._trunk.write(*state.ledger.trunk_end(state.adapters))
        self._trunk.commit()
        state.restore(snapshot.round, snapshot.facts)
        parties.emit(Notice(text=f"goes on after round {snapshot.round}  held-out loss {state.after:.4f}"))
        return state

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

    def _leave_result(self, parties: Parties, state: RunState, parameters: Mapping[str, Any]) -> None:
        """Writes the adapters that the run leaves, of its last round or of its best, and the summary."""
        stopping, folder = state.stopping, self._job.folder
        leaves_best = self._config.keep_best and not stopping.is_best
        if stopping.is_over or leaves_best:
            best = f"the best round was {stopping.best}, with a held-out loss of {stopping.lowest:.4f}"
            parties.emit(Notice(text=f"ends after round {stopping.last}: {stopping.reason}; {best}"))

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

        self.summary = self._summarise(state, parameters, left)
        for client, adapters in personal.items():  # before the summary, which says that a run is complete
            folder.save_personal(client, adapters)
        folder.save_result(whole)
        parties.emit(RunEnded(summary=self.summary, folder=str(folder.path)))

    def _summarise(self, state: RunState, parameters: Mapping[str, Any], left: int) -> dict[str, Any]:
        """Returns the content of summary.json.

        Args:
            state: State at the end of the run.
            parameters: Counts of parameters by part.
            left: Round whose adapters the run leaves.
        """
        config, trunk = self._config, self._trunk.status()
        return {
            "seed": config.seed,
            "model": config.model,
            "clients": config.clients,
            "rounds": config.rounds,
            "last_round": state.stopping.last,
            "best_round": state.stopping.best,
            "adapter_round": left,
            "ended": state.stopping.reason,
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
