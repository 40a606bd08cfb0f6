"""Flower's server side: the loop over rounds, and how a strategy's decision becomes messages."""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp
from torch import Tensor

from fedsplit import records
from fedsplit.actor import TrunkHandle
from fedsplit.aggregation import Aggregation, FederationFailed, Member, make_aggregation
from fedsplit.checkpoint import RunFolder
from fedsplit.config import Config, as_document
from fedsplit.evaluate import HeldOut, pooled
from fedsplit.report import Watcher, perplexity
from fedsplit.schedules import SCHEDULES, is_deterministic
from fedsplit.seeds import derive_seed
from fedsplit.updates import Adapters, ClientUpdate

POLL_SECONDS = 0.01
"""How long to sleep between two looks at what has come in."""


class Interrupted(Exception):
    """The run was asked to stop."""


@dataclass
class _Tally:
    """What is summed over a run."""

    tokens: int = 0
    train_seconds: float = 0.0
    client_memory: int = 0
    traffic: Counter[str] = field(default_factory=Counter)


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
        threads: int,
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
            threads: Threads of a client's process.
            strategy: Ours or Flower's.
            folder: Where results go.
            watcher: Who is told.
            started: When the command began, by `time.perf_counter`.
        """
        self._config, self._trunk, self._strategy = config, trunk, strategy
        self._schedule, self._incarnation = SCHEDULES[config.trunk.schedule], ""
        self._at_clients: frozenset[str] = frozenset()
        self._folder, self._watcher = folder, watcher
        self._run, self._trunk_name, self._threads = json.dumps(as_document(config)), trunk_name, threads
        self._members: list[Member] = []
        self._tally = _Tally()
        self._forgotten: dict[str, float] = {}
        self._started = started
        self.stop = threading.Event()
        self.summary: dict[str, Any] | None = None

    def app(self) -> ServerApp:
        """The ServerApp that runs this federation."""
        app = ServerApp()

        @app.main()
        def main(grid: Grid, context: Context) -> None:
            self.run(grid)

        return app

    def run(self, grid: Grid) -> None:
        """All rounds.

        Raises:
            FederationFailed: No client answered.
            RefusedUpdate: A client sent what must not be aggregated.
            Interrupted: `stop` was set.
        """
        adapters, parameters = self._meet(grid)
        aggregation = make_aggregation(self._strategy, self._members)
        before = after = self._evaluate(grid, 0, adapters, {})
        self._announce(0, before)
        for round in range(1, self._config.rounds + 1):
            # 1. Every client trains from the same adapters; the trunk learns as they do.
            replies, updates, own = self._train(grid, round, adapters, aggregation)
            # 2. The strategy makes one set of adapters of theirs.
            adapters = aggregation.aggregate(round, adapters, replies, updates)
            if self._schedule.personal:
                self._trunk.write({n: t for n, t in adapters.tensors.items() if n not in self._at_clients})
            # 3. Every client measures it.
            after = self._evaluate(grid, round, adapters, own)
            # 4. What came of it is kept, and told.
            self._folder.save_round(round, self._whole(adapters))
            self._announce(round, after, updates)
        self.summary = self._summarise(parameters, before, after)
        self._folder.save_result(self._whole(adapters), self.summary)

    def _whole(self, adapters: Adapters) -> dict[str, Tensor]:
        return dict((self._trunk.read() | adapters).tensors)

    def _exchange(
        self, grid: Grid, messages: Iterable[Message], heard: Callable[[Message, int, int], None]
    ) -> list[Message]:
        """Sends messages, waits for all replies, and returns those that are no errors."""
        waiting = set(grid.push_messages(messages))
        expected = len(waiting)
        replies: list[Message] = []
        failures: list[Message] = []
        while waiting:
            if self.stop.is_set():
                raise Interrupted
            for reply in grid.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                (failures if reply.has_error() else replies).append(reply)
                if not reply.has_error():
                    heard(reply, len(replies) + len(failures), expected)
                elif (client := self._client_at(reply.metadata.src_node_id)) is not None:
                    self._trunk.leave(client)  # nobody need wait for it
            time.sleep(POLL_SECONDS)
        for failure in failures:
            client = self._client_at(failure.metadata.src_node_id)
            name = "a client" if client is None else self._members[client].name
            self._watcher.line(f"{name} failed and is left out: {_reason(failure.error.reason)}")
        if not replies:
            reason = _reason(failures[0].error.reason) if failures else "nobody was asked"
            raise FederationFailed(f"no client answered: {reason}")
        return replies

    def _client_at(self, node: int) -> int | None:
        return next((client for client, member in enumerate(self._members) if member.node == node), None)

    def _ask_all(self, grid: Grid, kind: str, content: RecordDict, text: str) -> list[Message]:
        """Sends the same to every member, and shows how many have answered; replies by client."""
        messages = [records.message_to(member.node, kind, content) for member in self._members]
        replies = self._exchange(grid, messages, lambda _, done, of: self._watcher.phase(text, done, of))
        return sorted(replies, key=lambda reply: int(records.metrics_of(reply)["client"]))

    def _meet(self, grid: Grid) -> tuple[Adapters, dict[str, Any]]:
        """Finds out which node is which client, and what training starts from."""
        while len(nodes := list(grid.get_node_ids())) < self._config.clients:
            if self.stop.is_set():
                raise Interrupted
            time.sleep(POLL_SECONDS)
        self._watcher.phase("loading the parts", 0, len(nodes))
        trunk = self._trunk.status()
        self._incarnation = trunk["incarnation"]
        content = RecordDict({records.CONFIG: self._instructions(0)})
        messages = [records.message_to(node, MessageType.QUERY, content) for node in nodes]
        replies = self._exchange(grid, messages, lambda _, n, of: self._watcher.phase("loading the parts", n, of))
        if len(replies) < len(nodes):
            raise FederationFailed(f"only {len(replies)} of {len(nodes)} clients could load their parts")
        start, found, parameters = None, {}, {}
        for reply in replies:
            about, adapters = records.read_introduction(reply)
            found[int(about["client"])] = Member(reply.metadata.src_node_id, str(about["name"]))
            parameters, start = about["parameters"], adapters or start
        if start is None:
            raise FederationFailed("the first client did not say what training starts from")
        self._members[:] = [found[client] for client in sorted(found)]
        self._at_clients = frozenset(start.tensors)
        if self._schedule.personal:  # to the strategy, the copies of the trunk are the clients' own, too
            start |= self._trunk.read()
        return start, {"bottom": parameters["bottom"], "trunk": trunk["parameters"], "top": parameters["top"]}

    def _train(
        self, grid: Grid, round: int, adapters: Adapters, aggregation: Aggregation
    ) -> tuple[list[Message], list[ClientUpdate], dict[int, HeldOut]]:
        """A round of training: replies and updates, and what each client measured after its own steps."""
        started, losses, tokens = time.perf_counter(), [], 0
        groups = self._groups(round, aggregation.messages(round, adapters, self._instructions(round), grid))
        expected = sum(map(len, groups))

        def heard(reply: Message, done: int, of: int) -> None:
            nonlocal tokens
            metrics = records.metrics_of(reply)
            losses.append(metrics["loss"])
            tokens += int(metrics["tokens"])
            speed = tokens / (time.perf_counter() - started)
            status = f"{len(losses)}/{expected} clients trained  loss {_mean(losses):.4f}  {speed:,.0f} tokens/s"
            self._watcher.phase(f"{self._label(round)}  {status}", len(losses), expected)

        self._watcher.phase(f"{self._label(round)}  training", 0, expected)
        replies: list[Message] = []
        for group in groups:
            for message in group:
                message.content = records.only(message.content, self._at_clients)
                self._tally.traffic["adapter_down"] += records.nbytes(message.content)
            if len(groups) > 1 or self._takes_turns():
                self._trunk.begin([self._client_of(message) for message in group])
            replies += self._exchange(grid, group, heard)
        replies.sort(key=lambda reply: int(records.metrics_of(reply)["client"]))
        mine = self._of_clients(adapters)
        updates = [records.to_update(r, mine, self._name(r)) for r in replies]
        counts = self._trunk.end_round([update.client for update in updates])
        seconds = time.perf_counter() - started
        self._tally.traffic["adapter_up"] += sum(records.nbytes(reply.content) for reply in replies)
        self._tally.tokens += tokens
        self._tally.train_seconds += seconds
        self._remember_memory(replies)
        self._folder.log(
            {
                "event": "train",
                "round": round,
                "loss": _mean([update.loss for update in updates]),
                "clients": {self._members[u.client].name: u.loss for u in updates},
                "tokens": tokens,
                "seconds": seconds,
                "trunk": {**counts, "resident_memory": self._trunk.status()["resident_memory"]},
            }
        )
        own = {update.client: records.sample_of(reply) for update, reply in zip(updates, replies, strict=True)}
        if self._schedule.personal:
            copies = self._trunk.copies()
            updates = [replace(update, adapters=update.adapters | copies[update.client]) for update in updates]
            for reply, update in zip(replies, updates, strict=True):
                arrays = records.to_arrays(update.adapters.tensors)
                reply.content = RecordDict({**reply.content, records.ARRAYS: arrays})
        return replies, updates, own

    def _of_clients(self, adapters: Adapters) -> Adapters:
        """Without the trunk's, which never cross."""
        return adapters.with_tensors({n: t for n, t in adapters.tensors.items() if n in self._at_clients})

    def _takes_turns(self) -> bool:
        """Whether the order of steps must be fixed, since it decides the result."""
        trunk = self._config.trunk
        return self._config.deterministic and not is_deterministic(trunk.schedule, trunk.every)

    def _groups(self, round: int, messages: Iterable[Message]) -> list[list[Message]]:
        """Messages in the order in which clients begin the round, in groups that train at once."""
        ordered = sorted(messages, key=self._client_of)
        if self._config.trunk.order == "random":
            random.Random(derive_seed(self._config.seed, "order", round)).shuffle(ordered)
        size = self._config.trunk.group if self._takes_turns() else max(1, len(ordered))
        return [ordered[begin : begin + size] for begin in range(0, len(ordered), size)]

    def _client_of(self, message: Message) -> int:
        client = self._client_at(message.metadata.dst_node_id)
        if client is None:
            raise FederationFailed(f"the strategy sent a message to a node that is no client: {message.metadata}")
        return client

    def _instructions(self, round: int) -> ConfigRecord:
        return records.instructions(self._run, self._trunk_name, self._incarnation, self._threads, round)

    def _label(self, round: int) -> str:
        return f"round {round}/{self._config.rounds}"

    def _name(self, reply: Message) -> str:
        client = int(records.metrics_of(reply)["client"])
        return f"client {client} ({self._members[client].name})"

    def _remember_memory(self, replies: Iterable[Message]) -> None:
        peaks = [int(records.metrics_of(reply)["peak-memory"]) for reply in replies]
        self._tally.client_memory = max(self._tally.client_memory, *peaks)

    def _evaluate(self, grid: Grid, round: int, adapters: Adapters, own: Mapping[int, HeldOut]) -> float:
        """The clients' held-out loss, and what each lost since it was measured after its own steps."""
        started = time.perf_counter()
        arrays = records.to_arrays(self._of_clients(adapters).tensors)
        content = RecordDict({records.ARRAYS: arrays, records.CONFIG: self._instructions(round)})
        replies = self._ask_all(grid, MessageType.EVALUATE, content, f"{self._label(round)}  evaluating")
        self._tally.traffic["evaluation_adapter_down"] += records.nbytes(content) * len(self._members)
        self._remember_memory(replies)
        by_client = {int(records.metrics_of(reply)["client"]): reply for reply in replies}
        measured = {client: records.to_held_out(reply) for client, reply in by_client.items()}
        loss = pooled(measured.values()).loss
        self._forgotten = {
            self._members[client].name: records.sample_of(by_client[client]).loss - then.loss
            for client, then in own.items()
            if then.tokens and client in by_client
        }
        self._folder.log(
            {
                "event": "evaluate",
                "round": round,
                "loss": loss,
                "perplexity": perplexity(loss),
                "clients": {self._members[c].name: m.loss for c, m in measured.items()},
                "forgotten": self._forgotten,
                "tokens": sum(m.tokens for m in measured.values()),
                "seconds": time.perf_counter() - started,
            }
        )
        return loss

    def _announce(self, round: int, loss: float, updates: Sequence[ClientUpdate] = ()) -> None:
        tally, elapsed = self._tally, time.perf_counter() - self._started
        trained, speed = "", ""
        if updates:
            trained = f"training loss {_mean([update.loss for update in updates]):.4f}  "
            speed = f"  {tally.tokens / tally.train_seconds:,.0f} tokens/s"
            if self._forgotten:
                speed = f"  forgotten {_mean(list(self._forgotten.values())):+.4f}{speed}"
        self._watcher.line(
            f"{self._label(round)}  {trained}held-out loss {loss:.4f}  "
            f"perplexity {perplexity(loss):.2f}{speed}  {elapsed:.1f} s"
        )

    def _summarise(self, parameters: Mapping[str, Any], before: float, after: float) -> dict[str, Any]:
        config, tally, trunk = self._config, self._tally, self._trunk.status()
        traffic = Counter(trunk["traffic"]) + tally.traffic
        kinds = ("activation", "gradient", "adapter", "repeated")
        directions = [f"{what}_{way}" for what in kinds for way in ("up", "down")]
        evaluation = {
            f"evaluation_{way}": sum(n for name, n in traffic.items() if name.startswith("eval") and name.endswith(way))
            for way in ("up", "down")
        }
        return {
            "seed": config.seed,
            "model": config.model,
            "clients": config.clients,
            "rounds": config.rounds,
            "strategy": config.strategy,
            "schedule": config.trunk.schedule,
            "cut": config.cut,
            "parameters": dict(parameters),
            "eval_loss": {"before": before, "after": after},
            "forgotten": _mean(list(self._forgotten.values())) if self._forgotten else None,
            "tokens": tally.tokens,
            "tokens_per_second": tally.tokens / tally.train_seconds,
            "wall_seconds": time.perf_counter() - self._started,
            "bytes": {name: traffic[name] for name in directions} | evaluation,
            "peak_memory": {"client": tally.client_memory, "trunk": trunk["peak_memory"]},
        }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _reason(text: str | None) -> str:
    """Why a client failed, in a line: Flower sends `<class 'module.Error'>:<'text'>`, or a traceback."""
    if match := re.fullmatch(r"<class '(?:\w+\.)*([\w()]+)'>:<'?(.*?)'?>", text or "", re.DOTALL):
        text = match[2] if "\n" in match[2] else f"{match[1]}: {match[2]}"
    lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
    return lines[-1].rpartition("ClientAppException occurred. Message: ")[2] if lines else "no reason was given"
