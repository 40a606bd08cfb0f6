"""Flower's server side: the loop over rounds, and how a strategy's decision becomes messages."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp
from torch import Tensor

from fedsplit.config import Config
from fedsplit.documents import as_document
from fedsplit.federation import records
from fedsplit.federation.aggregation import FederationFailed, Member, make_aggregation
from fedsplit.federation.checkpoint import RunFolder, Snapshot
from fedsplit.federation.engine import kill_busy_workers
from fedsplit.federation.exchange import Exchange, NobodyAnswered
from fedsplit.federation.fidelity import measure
from fedsplit.federation.holdings import Holdings
from fedsplit.federation.stalls import StallWatch
from fedsplit.federation.strategy import aggregated_parts, coverage
from fedsplit.federation.tally import Tally
from fedsplit.federation.turns import groups_of, takes_turns
from fedsplit.federation.workload import Workload
from fedsplit.metrics.metric import name_of
from fedsplit.optimization.stopping import Course
from fedsplit.report import Watcher, perplexity, round_line
from fedsplit.scores import Score, means, means_by_metric, pooled
from fedsplit.trunk.actor import TrunkHandle
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.updates import Adapters, Assignment, ClientUpdate, RefusedUpdate


class Federation:
    """The server's run, from meeting the clients to the summary.

    Attributes:
        stop: Set from another thread to end the run at the next look at what has come in.
        summary: The result, once there is one.
    """

    def __init__(
        self,
        config: Config,
        trunk: TrunkHandle,
        trunk_name: str,
        workers: int,
        threads: int,
        workloads: Sequence[Workload],
        strategy: Any,
        folder: RunFolder,
        watcher: Watcher,
        started: float,
    ) -> None:
        """Nothing happens before `run`.

        Args:
            config: The run's configuration.
            trunk: The trunk's handle.
            trunk_name: What clients find it by; names the run, too.
            workers: Processes that play the clients.
            threads: Threads of each of them.
            workloads: Bounds, by client, of the counts that clients may report.
            strategy: Ours or Flower's.
            folder: Where results go, and, of a run that goes on, come from.
            watcher: Who is told.
            started: When the command began, by `time.perf_counter`.
        """
        self._config, self._trunk, self._workloads = config, trunk, workloads
        self._schedule = SCHEDULES[config.trunk.schedule]
        self._folder, self._watcher, self._tally = folder, watcher, Tally(started)
        self.stop = threading.Event()
        stalls = StallWatch(config.timeout, lambda: trunk.status()["traffic"], kill_busy_workers)
        self._exchange = Exchange(self.stop, watcher, trunk.leave, workers, stalls)
        self._aggregation = make_aggregation(strategy, config, self._exchange.members)
        self._facts: dict[str, str | int] = {
            "run": json.dumps(as_document(config)),
            "trunk": trunk_name,
            "threads": threads,
            "store": str(folder.clients),
            "personal": "".join(sorted(self._aggregation.traits.personal)),
        }
        self._forgotten: dict[str, float] = {}
        self._error: float | None = None
        self._course = Course(config.patience, config.min_delta)
        self._accuracy: dict[str, float] = {}  # of classes, before and after
        self._metric_names = [name_of(spec) for spec in config.metric]
        self._metrics: dict[str, dict[str, float | None]] = {}  # of each, before and after
        self.summary: dict[str, Any] | None = None

    def app(self) -> ServerApp:
        """The ServerApp that runs this federation."""
        app = ServerApp()

        @app.main()
        def main(grid: Grid, context: Context) -> None:
            try:
                self.run(grid)
            except BaseException:
                kill_busy_workers()  # Flower waits for their answers, which may never come
                raise

        return app

    def run(self, grid: Grid) -> None:
        """All rounds, or those that are left.

        Raises:
            FederationFailed: No client answered, or no answer could be used.
            RefusedUpdate: The strategy returned what cannot be used.
            Interrupted: `stop` was set.
        """
        parts, parameters = self._meet(grid)
        folder, traits = self._folder, self._aggregation.traits
        self._holdings = Holdings(self._config, traits, parts, folder.clients, folder.folds)
        trained = {part: counts["trainable"] for part, counts in parameters.items()}
        self._watcher.line(coverage(self._config, trained))
        adapters, snapshot = self._holdings.start, folder.snapshot()
        if snapshot is None:
            last, before = 0, self._evaluate(grid, 0, adapters, {})
            after = before
            self._announce(0, before)
        else:
            last, before, after = snapshot.round, snapshot.facts["before"], snapshot.facts["after"]
            adapters = self._restore(snapshot, adapters)
        for round in range(last + 1, self._config.rounds + 1):
            if self._course.is_over:
                break
            # 1. Clients train from what the strategy gives them; the trunk learns as they do.
            given = adapters
            replies, updates, own = self._train(grid, round, given)
            # 2. The strategy makes one set of adapters of theirs, which every party takes over.
            adapters = self._aggregate(round, given, replies, updates)
            loss = _mean([update.loss for update in updates]) if updates else None
            changed = self._has_changed(round, given, adapters, bool(updates))
            del replies, updates, given  # or those of two rounds are there at the end of the next
            # 3. Every client measures it.
            after = self._evaluate(grid, round, adapters, own)
            self._course.note(round, after, changed)
            # 4. What came of it is kept, and told.
            self._save(round, adapters, before, after)
            self._announce(round, after, loss)
        self._leave_result(parameters, before, after, adapters)

    def _leave_result(self, parameters: Mapping[str, Any], before: float, after: float, adapters: Adapters) -> None:
        """Writes the adapters that the run leaves, of its last round or of its best, and the summary."""
        course = self._course
        if course.is_over or (self._config.keep_best and not course.is_best):
            best = f"the best round was {course.best}, with a held-out loss of {course.lowest:.4f}"
            self._watcher.line(f"ends after round {course.last}: {course.reason}; {best}")
        if self._config.keep_best and not course.is_best:
            left, after = course.best, course.lowest
            whole, own = self._folder.read_round(left)
            facts = self._folder.read_facts(left)  # all that the summary tells of a single round is of this one
            self._forgotten, self._error, self._accuracy = facts["forgotten"], facts["error"], facts["accuracy"]
            self._metrics = facts.get("metrics", {})
        else:
            trunk = self._trunk.read()
            left, whole, own = course.last, self._holdings.everything(adapters, trunk), self._personal(adapters, trunk)
        self.summary = self._summarise(parameters, before, after, left)
        for client, alone in own.items():  # before the summary, by which a run is known to have come to its end
            self._folder.save_personal(client, alone)
        self._folder.save_result(whole, self.summary)

    def _personal(self, adapters: Adapters, trunk: Adapters) -> dict[int, Adapters]:
        """By client, the whole model's adapters as that client has them; of clients with any of their own."""
        mixed = {
            client: adapters.with_tensors({**adapters.tensors, **alone})
            for client, alone in self._holdings.personal_adapters().items()
        }
        return {client: self._holdings.everything(own, trunk) for client, own in mixed.items()}

    def _save(self, round: int, adapters: Adapters, before: float, after: float) -> None:
        """Everything that a run needs to go on from here."""
        facts, groups = self._holdings.snapshot()
        facts |= {
            "before": before,
            "after": after,
            "tally": self._tally.document(self._trunk.status()["traffic"]),
            "forgotten": self._forgotten,
            "error": self._error,
            "course": self._course.document(),
            "accuracy": self._accuracy,
            "metrics": self._metrics,
        }
        groups |= {"adapters": dict(adapters.tensors), "strategy": dict(self._aggregation.state())}
        trunk = self._trunk.read()
        groups |= {"trunk": dict(trunk.tensors), "moments": self._trunk.moments()}
        _check_finite(round, {name: groups[name] for name in ("adapters", "trunk", "moments")})
        candidate = self._config.keep_best and self._course.is_best
        personal = self._personal(adapters, trunk) if candidate else {}
        whole = self._holdings.everything(adapters, trunk)
        self._folder.save_round(Snapshot(round, facts, groups), whole, personal)

    def _restore(self, snapshot: Snapshot, adapters: Adapters) -> Adapters:
        """Brings everything back to where it was at the end of a round; the adapters of that round."""
        facts, groups = snapshot.facts, snapshot.groups
        self._aggregation.restore(groups.get("strategy", {}))
        for changes in self._holdings.restore(snapshot.round, facts, groups):
            if self._schedule.personal:
                self._trunk.fold(changes)
        adapters = adapters.with_tensors(groups.get("adapters", {}))
        self._trunk.restore(groups.get("trunk", {}), groups.get("moments", {}))
        if self._schedule.personal:
            self._trunk.write(*self._holdings.trunk_end(adapters))
        self._tally = self._tally.go_on(facts["tally"])
        self._forgotten, self._error = facts["forgotten"], facts["error"]
        self._course.go_on(facts["course"])
        self._accuracy = facts.get("accuracy", {})
        self._metrics = facts.get("metrics", {})
        self._watcher.line(f"goes on after round {snapshot.round}  held-out loss {facts['after']:.4f}")
        return adapters

    def _log(self, event: Mapping[str, Any]) -> None:
        self._folder.log({**event, "elapsed": self._tally.seconds})

    def _meet(self, grid: Grid) -> tuple[dict[str, Adapters], dict[str, Any]]:
        """Finds out which node is which client, and what training starts from."""
        nodes = self._exchange.meet(grid, self._config.clients)
        self._watcher.phase("loading the parts", 0, len(nodes))
        trunk = self._trunk.status()
        self._facts["incarnation"] = trunk["incarnation"]
        content = RecordDict({records.CONFIG: self._instructions(0, folded=0)})
        messages = (records.message_to(node, MessageType.QUERY, content) for node in nodes)

        def heard(_: Message, done: int, of: int) -> None:
            self._watcher.phase("loading the parts", done, of)

        replies = self._exchange.send(grid, messages, len(nodes), heard)
        if len(replies) < len(nodes):
            raise FederationFailed(f"only {len(replies)} of {len(nodes)} clients could load their parts")
        parts: dict[str, Adapters] = {"trunk": self._trunk.read()}
        found: dict[int, Member] = {}
        parameters: dict[str, Any] = {}
        for reply in replies:
            about, start = records.read_introduction(reply)
            client = about["client"]
            if client not in range(len(nodes)) or client in found:
                raise FederationFailed(f"two nodes say that they are client {client}, or there is none of that number")
            found[client] = Member(reply.metadata.src_node_id, str(about["name"]))
            if not client:  # it alone tells what training starts from
                parameters = about["parameters"]
                parts |= {part: start[part] for part in ("bottom", "top") if part in start}
        if parts.keys() != {"bottom", "trunk", "top"}:
            raise FederationFailed("the first client did not say what training starts from")
        self._exchange.know([found[client] for client in sorted(found)])
        return parts, {"bottom": parameters["bottom"], "trunk": trunk["parameters"], "top": parameters["top"]}

    def _train(
        self, grid: Grid, round: int, adapters: Adapters
    ) -> tuple[list[Message], list[ClientUpdate], dict[int, Score]]:
        """A round of training: replies and updates, and what each client measured after its own steps."""
        started = time.perf_counter()
        assigned = self._aggregation.assign(round, adapters, grid)
        if self._schedule.personal:
            self._trunk.assign({client: self._holdings.trunk_start(client, one) for client, one in assigned.items()})
        tokens, used = self._ask_to_train(grid, round, assigned, started)
        replies, updates = [reply for reply, _ in used], [update for _, update in used]
        counts = self._trunk.end_round([update.client for update in updates])
        if counts.get("unusable"):
            words = "the trunk made no step, after which its adapter would not be finite: --train.lr is too large"
            self._watcher.line(f"{self._label(round)}  {words} ({self._config.train.lr:g})")
        own = {update.client: records.sample_of(reply) for reply, update in used}
        if self._schedule.personal:
            updates = self._holdings.with_copies(updates, self._trunk.copies(), assigned)
        for update in updates:
            self._holdings.accept(update.client, round, assigned[update.client])
        seconds = time.perf_counter() - started
        self._tally.tokens += tokens
        self._tally.asked += len(assigned)
        self._tally.failed += len(assigned) - len(updates)
        self._tally.train_seconds += seconds
        self._remember_memory(replies)
        self._log(
            {
                "event": "train",
                "round": round,
                "loss": _mean([update.loss for update in updates]) if updates else None,
                "clients": {self._exchange.members[u.client].name: u.loss for u in updates},
                **_router_loss(updates),
                "tokens": tokens,
                "seconds": seconds,
                "trunk": {**counts, "resident_memory": self._trunk.status()["resident_memory"]},
            }
        )
        return replies, updates, own

    def _ask_to_train(
        self, grid: Grid, round: int, assigned: Mapping[int, Assignment], started: float
    ) -> tuple[int, list[tuple[Message, ClientUpdate]]]:
        """Has the clients of a round train, group by group, and shows how far they are.

        Returns:
            The tokens that they trained on; and in the order of the clients those replies that can be used, without
            their arrays, and the updates that these came to.
        """
        label, groups, expected = self._label(round), groups_of(self._config, round, assigned), len(assigned)
        losses: list[float] = []
        tokens = 0
        used: dict[int, tuple[Message, ClientUpdate]] = {}
        reason = "no client sent anything that can be used"
        alternates = len(groups) > 1 or takes_turns(self._config)

        def heard(reply: Message, done: int, of: int) -> None:
            nonlocal tokens
            client = self._exchange.number_of(reply)
            self._count("adapter_up", [reply])
            update = self._accepted(reply, client, assigned[client])
            records.keep_metrics(reply)  # arrays would be there at the end of the round, and once more as tensors
            if update is None or alternates:  # whoever has answered is not waited for, even if it did not say goodbye
                self._trunk.leave(client)
            if update is None:
                return
            used[client] = reply, update
            losses.append(update.loss)
            tokens += update.tokens
            speed = tokens / (time.perf_counter() - started)
            status = f"{len(losses)}/{expected} trained  loss {_mean(losses):.4f}  {speed:,.0f} tokens/s"
            self._watcher.phase(f"{label}  {status}", len(losses), expected)

        self._watcher.phase(f"{label}  training", 0, expected)
        for group in groups:
            if alternates:
                self._trunk.begin(group)
            invitations = (self._invitation(client, assigned[client], round) for client in group)
            try:
                self._exchange.send(grid, invitations, len(group), heard)
            except NobodyAnswered as failed:  # those of other groups may
                reason = str(failed)
        if groups and not used:
            raise FederationFailed(reason)
        return tokens, [used[client] for client in sorted(used)]

    def _invitation(self, client: int, assignment: Assignment, round: int) -> Message:
        """What a client is sent to train: instructions, its task, and those adapters that it does not have."""
        task, rank = assignment.task, assignment.adapters.largest_rank or self._config.lora.rank_of(client)
        accepted = self._holdings.accepted.get(client, 0)
        content: dict[str, Any] = {
            records.ARRAYS: records.to_arrays(self._holdings.lacking(client, assignment)),
            records.CONFIG: self._instructions(round, accepted=accepted),
            records.TASK: records.to_task(task, assignment.drawn, rank),
        }
        if task.control is not None:
            content[records.CONTROL] = records.to_arrays(self._holdings.crossing(task.control))
        message = records.message_to(self._exchange.members[client].node, MessageType.TRAIN, RecordDict(content))
        self._count("adapter_down", [message])
        return message

    def _accepted(self, reply: Message, client: int, assignment: Assignment) -> ClientUpdate | None:
        """A reply as an update with its weight; one that cannot be used is named and left out."""
        given, trained = self._holdings.sent(assignment)
        sender, workload = self._exchange.name(client), self._workloads[client]
        try:
            update = records.to_update(reply, given, trained, client, sender, workload)
        except RefusedUpdate as refused:
            self._watcher.line(f"{refused}; it is left out")
            return None
        weight = {"examples": update.examples, "tokens": update.tokens, "equal": 1.0 if update.examples else 0.0}
        return replace(update, weight=float(weight[self._config.weights]))

    def _aggregate(
        self, round: int, adapters: Adapters, replies: list[Message], updates: list[ClientUpdate]
    ) -> Adapters:
        """The strategy's aggregation; what it changes of the trunk and of base weights is put there."""
        if not updates and not self._aggregation.traits.idles:  # all rest
            self._holdings.fold(round, {})
            self._error = None
            return adapters
        started = time.perf_counter()
        result = self._aggregation.aggregate(round, adapters, replies, updates)
        seconds = time.perf_counter() - started
        self._holdings.fold(round, result.folded)
        if self._schedule.personal:
            self._trunk.write(*self._holdings.trunk_end(result))
            self._trunk.fold(result.folded)
        if not updates:
            self._error = None
            return result.with_tensors(result.tensors)
        found = measure(updates, result)
        self._error = found.overall
        self._log(
            {
                "event": "aggregate",
                "round": round,
                "seconds": seconds,
                "error": found.overall,
                "layers": found.layers,
                "residual_rank": found.residual_rank,
            }
        )
        return result.with_tensors(result.tensors)

    def _has_changed(self, round: int, before: Adapters, after: Adapters, trained: bool) -> bool:
        """Returns whether a round changed anything of the model.

        It may not: a strategy that simulates delays lets clients rest, or keeps their changes for a later round.

        Args:
            round: The round.
            before: Shared adapters at its start.
            after: Shared adapters at its end.
            trained: Any client trained.
        """
        trunk_learns = self._schedule.learns and not self._schedule.personal  # beside the strategy, at every step
        if trained and (trunk_learns or self._holdings.has_personal):
            return True
        if self._holdings.last_fold == round:
            return True
        return any(not torch.equal(tensor, after.tensors[name]) for name, tensor in before.tensors.items())

    def _instructions(self, round: int, accepted: int = 0, folded: int | None = None) -> ConfigRecord:
        folded = self._holdings.last_fold if folded is None else folded
        return records.instructions({**self._facts, "accepted": accepted, "folded": folded}, round)

    def _label(self, round: int) -> str:
        return f"round {round}/{self._config.rounds}"

    def _count(self, what: str, messages: Iterable[Message]) -> None:
        self._tally.traffic[what] += sum(records.nbytes(message.content) for message in messages)

    def _remember_memory(self, replies: Iterable[Message]) -> None:
        peaks = [records.memory_of(reply) for reply in replies]
        self._tally.client_memory = max([self._tally.client_memory, *peaks])

    def _evaluate(self, grid: Grid, round: int, adapters: Adapters, own: Mapping[int, Score]) -> float:
        """The clients' held-out loss, and what each lost since it was measured after its own steps."""
        started = time.perf_counter()
        shared: dict[str, Any] = {records.ARRAYS: records.to_arrays(self._holdings.crossing(adapters.tensors))}
        if self._holdings.news:  # owed to everyone, whether it trained or not
            shared[records.FOLD] = records.to_fold(self._holdings.news)

        def question(client: int, member: Member) -> Message:
            config = self._instructions(round, accepted=self._holdings.accepted.get(client, 0))
            return records.message_to(member.node, MessageType.EVALUATE, RecordDict({**shared, records.CONFIG: config}))

        members = self._exchange.members
        messages = itertools.starmap(question, enumerate(members))
        replies = self._exchange.ask_all(grid, messages, f"{self._label(round)}  evaluating")
        self._tally.traffic["adapter_down"] += records.array_bytes(shared.get(records.FOLD)) * len(members)
        self._tally.traffic["evaluation_adapter_down"] += records.array_bytes(shared[records.ARRAYS]) * len(members)
        by_client, measured = self._measured(replies)
        self._remember_memory(by_client.values())
        found = pooled(measured.values())
        loss = found.loss
        if self._config.data.format == "classification":
            self._accuracy = {"before": found.accuracy, **self._accuracy, "after": found.accuracy}
        metrics = means(found.metrics)
        for name, mean in metrics.items():
            self._metrics[name] = {"before": mean, **self._metrics.get(name, {}), "after": mean}
        of_clients = means_by_metric((members[client].name, score.metrics) for client, score in measured.items())
        self._forgotten = {
            self._exchange.members[client].name: now.loss - then.loss
            for client, then in own.items()
            if client in by_client and then.tokens and (now := records.sample_of(by_client[client])).tokens
        }
        self._log(
            {
                "event": "evaluate",
                "round": round,
                "loss": loss,
                **({"accuracy": found.accuracy} if self._accuracy else {"perplexity": perplexity(loss)}),
                "clients": {self._exchange.members[c].name: m.loss for c, m in measured.items()},
                **({"metrics": metrics, "client_metrics": of_clients} if metrics else {}),
                "forgotten": self._forgotten,
                "adapter_bytes": self._tally.adapter_bytes(),
                "tokens": sum(m.tokens for m in measured.values()),
                "seconds": time.perf_counter() - started,
            }
        )
        return loss

    def _measured(self, replies: Iterable[Message]) -> tuple[dict[int, Message], dict[int, Score]]:
        """Those replies to an evaluation that can be used, by client, and what they say; others are named and left out.

        Raises:
            FederationFailed: None can be used.
        """
        usable: dict[int, Message] = {}
        measured: dict[int, Score] = {}
        reason = ""
        for reply in replies:
            client = self._exchange.number_of(reply)
            sender, workload = self._exchange.name(client), self._workloads[client]
            try:
                measured[client] = records.to_held_out(reply, client, sender, workload, self._metric_names)
            except RefusedUpdate as refused:
                reason = str(refused)
                self._watcher.line(f"{refused}; it is left out")
            else:
                usable[client] = reply
        if not measured:
            raise FederationFailed(f"no client measured anything that can be used: {reason}")
        return usable, measured

    def _announce(self, round: int, loss: float, training_loss: float | None = None) -> None:
        """Shows the line of a round."""
        tally, accuracy = self._tally, self._accuracy.get("after")
        metrics = {name: ends["after"] for name, ends in self._metrics.items()}
        line = round_line(self._label(round), training_loss, loss, accuracy, tally.seconds, tally.speed, metrics)
        self._watcher.line(line)

    def _summarise(self, parameters: Mapping[str, Any], before: float, after: float, left: int) -> dict[str, Any]:
        config, trunk = self._config, self._trunk.status()
        return {
            "seed": config.seed,
            "model": config.model,
            "clients": config.clients,
            "rounds": config.rounds,
            "last_round": self._course.last,
            "best_round": self._course.best,
            "adapter_round": left,
            "ended": self._course.reason,
            "strategy": config.strategy,
            "aggregated_parts": aggregated_parts(config),
            "schedule": config.trunk.schedule,
            "cut": config.cut,
            "parameters": dict(parameters),
            "eval_loss": {"before": before, "after": after},
            **({"accuracy": self._accuracy} if self._accuracy else {}),
            **({"metrics": self._metrics} if self._metrics else {}),
            "forgotten": _mean(list(self._forgotten.values())) if self._forgotten else None,
            "aggregation_error": self._error,
            **self._tally.summary(trunk["traffic"]),
            "peak_memory": {"client": self._tally.client_memory, "trunk": trunk["peak_memory"]},
        }


def _check_finite(round: int, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Makes sure that a checkpoint holds nothing from which no run can go on.

    Raises:
        FederationFailed: A value is NaN or infinite.
    """
    for group, tensors in groups.items():
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                words = f"round {round} left NaN or infinite values in {name} ({group})"
                raise FederationFailed(f"{words}: it is not saved, and a run can go on from the round before it")


def _router_loss(updates: Sequence[ClientUpdate]) -> dict[str, float]:
    """The clients' mean auxiliary loss, where there is one."""
    found = [update.router_loss for update in updates if update.router_loss is not None]
    return {"router_aux_loss": _mean(found)} if found else {}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
