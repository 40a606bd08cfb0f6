"""Flower's own strategies at work: to them, the adapters are ordinary arrays."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fedsplit.federation import records
from fedsplit.federation.clients import ClientNode, FederationFailed, Roster
from fedsplit.federation.messages import ADAPTERS, Reply
from fedsplit.federation.replies import KEPT_METRICS
from fedsplit.federation.strategy import State, named
from fedsplit.seeds import derive_seed
from fedsplit.settings.config import Config
from fedsplit.updates import Adapters, Assignment, ClientUpdate, Task, Traits

WAITING_LOOKS = 3
"""Looks at the nodes, each after a pause, that a strategy may take; there never are more than at the first look."""

MOST_LOOKS = 1000
"""Looks that a strategy may take at all in one round: one that waits without a pause comes to this soon."""

_PAUSE_SECONDS = 0.5
"""Time between two looks from which on a strategy waits; Flower's own sleep a second."""


class _OrderedGrid:
    """Flower's grid, with nodes in the order of the clients: their ids are random, and Flower draws from a list.

    Where no Flower runs there is no grid, and all nodes are there.
    """

    def __init__(self, roster: Roster) -> None:
        self._grid = roster.grid
        self._nodes = roster.nodes
        self._looks = 0
        self._waits = 0
        self._looked = time.monotonic()

    def get_node_ids(self) -> Iterable[int]:
        before, self._looked = self._looked, time.monotonic()
        self._looks += 1
        self._waits += self._looks > 1 and self._looked - before > _PAUSE_SECONDS
        if self._waits >= WAITING_LOOKS or self._looks > MOST_LOOKS:
            raise FederationFailed(f"the strategy waits for more nodes than the {len(self._nodes)} that there are")
        everyone = [node.node for node in self._nodes]
        if self._grid is None:
            return everyone
        there = set(self._grid.get_node_ids())
        return [node for node in everyone if node in there]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)


@dataclass(frozen=True)
class _NotCopied:
    """Stands for the copy of a strategy that cannot be copied.

    Attributes:
        reason: Error that copying raised.
    """

    reason: str


class FlowerAggregation:
    """Runs any `flwr.serverapp.strategy.Strategy`.

    Sampling is the strategy's own, but drawn from the run's seed. Evaluation is not left to it: every client evaluates
    after every round. A strategy's memory is its own, and cannot be saved.
    """

    traits = Traits()

    def __init__(self, strategy: Any, config: Config) -> None:
        """Wraps a strategy.

        Args:
            strategy: The strategy.
            config: Configuration of the run.
        """
        self._strategy = strategy
        self._config = config
        self._nodes: Sequence[ClientNode] = ()

    def assign(self, round: int, adapters: Adapters, roster: Roster) -> dict[int, Assignment]:
        """Returns the strategy's own choice; of its settings, FedProx's mu is heeded."""
        self._nodes = roster.nodes
        drawn = random.getstate()
        random.seed(derive_seed(self._config.seed, "sample", round))
        try:
            with named(self._strategy, round), records.named_run():
                grid: Any = _OrderedGrid(roster)
                config = ConfigRecord({records.ROUND: round})
                arrays = records.to_arrays(adapters.tensors)
                messages = list(self._strategy.configure_train(round, arrays, config, grid))
        finally:
            random.setstate(drawn)

        clients = {node.node: client for client, node in enumerate(self._nodes)}
        assigned = {}
        for message in messages:
            node = message.metadata.dst_node_id
            if node not in clients:
                raise FederationFailed(f"the strategy sent a message to a node that is no client: {message.metadata}")
            settings = self._settings(message)
            tensors = records.from_arrays(message.content.array_records[ADAPTERS])
            task = Task(proximal=float(settings.get(records.PROXIMAL, 0.0)))
            assigned[clients[node]] = Assignment(adapters.with_tensors(tensors), task)
        return assigned

    def _settings(self, message: Message) -> dict[str, Any]:
        """Returns the settings that a message gives to a client.

        Raises:
            FederationFailed: The message asks for something that our clients do not do, such as clipping for
                differential privacy: the run would go on without it.
        """
        name, content = type(self._strategy).__name__, message.content
        if content.keys() != {ADAPTERS, records.CONFIG}:
            known = f"the records {ADAPTERS} and {records.CONFIG}"
            raise FederationFailed(f"{name} sends clients {', '.join(sorted(content))}; they read {known}")
        settings = dict(content.config_records[records.CONFIG])
        unknown = sorted(settings.keys() - {records.ROUND, records.PROXIMAL})
        if unknown:
            known = f"{records.ROUND} and {records.PROXIMAL}"
            raise FederationFailed(
                f"{name} sends clients the setting {unknown[0]}, of which they know nothing: the half of it that works "
                f"at the client is missing, and the run would go on without it; clients know {known}"
            )
        return settings

    def aggregate(
        self, round: int, adapters: Adapters, updates: Sequence[ClientUpdate], replies: Sequence[Reply]
    ) -> Adapters:
        """Returns the strategy's own aggregate, back in float32; it weights by what `--weights` says."""
        messages = [self._message(update, reply) for update, reply in zip(updates, replies, strict=True)]
        with named(self._strategy, round), records.named_run():
            arrays, _ = self._strategy.aggregate_train(round, messages)
        if arrays is None:
            raise FederationFailed(f"{type(self._strategy).__name__} returned no adapters in round {round}")
        tensors = records.from_arrays(arrays)
        adapters.check_fits(tensors, f"the strategy {type(self._strategy).__name__}")
        return adapters.with_tensors(tensors)

    def _message(self, update: ClientUpdate, reply: Reply) -> Message:
        """Returns an update as the reply that Flower's strategies expect from a node."""
        metrics = {name: reply.metrics[name] for name in KEPT_METRICS if name in reply.metrics}
        metrics[records.WEIGHT] = update.examples if update.weight is None else int(update.weight)
        content = RecordDict(
            {records.METRICS: MetricRecord(metrics), ADAPTERS: records.to_arrays(update.adapters.tensors)}
        )
        node = self._nodes[update.client].node
        with records.named_run():
            question = Message(RecordDict(), dst_node_id=node, message_type="train")
            return Message(content, reply_to=question)

    def state(self) -> State:
        """Returns nothing: the strategy's memory cannot be read."""
        return {}

    def restore(self, state: State) -> None:
        """Refuses to go on from a checkpoint.

        Raises:
            FederationFailed: Always.
        """
        raise FederationFailed(f"what {type(self._strategy).__name__} remembers is not saved: such a run cannot go on")

    def memory(self) -> object:
        """Returns a copy of the strategy; the reason, where it cannot be copied, as one that holds a lock."""
        try:
            return copy.deepcopy(self._strategy)
        except Exception as error:  # noqa: BLE001  # a user's class may refuse in any way, and still play every round
            return _NotCopied(f"{type(error).__name__}: {error}")

    def recall(self, memory: Any) -> None:
        """Goes on with an earlier copy of the strategy.

        Raises:
            FederationFailed: The strategy could not be copied, so that a round cannot be played again.
        """
        if isinstance(memory, _NotCopied):
            name = type(self._strategy).__name__
            raise FederationFailed(f"the round cannot be played again: {name} cannot be copied ({memory.reason})")
        self._strategy = copy.deepcopy(memory)
