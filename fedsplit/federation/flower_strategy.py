"""Runs strategies of Flower's. For Flower, the adapters are ordinary arrays."""

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
from fedsplit.federation.replies import FOR_STRATEGIES
from fedsplit.federation.strategy import State, aggregated_parts, named
from fedsplit.seeds import derive_seed
from fedsplit.settings.config import Config
from fedsplit.updates import Adapters, Assignment, ClientUpdate, Task, Traits

WAITING_LOOKS = 3
"""Number of looks at the nodes, each after a pause, after which a strategy is refused. The nodes never change."""

MOST_LOOKS = 1000
"""Number of looks at the nodes in one round after which a strategy is refused that waits without a pause."""

_PAUSE_SECONDS = 0.5
"""Seconds between two looks that count as a pause. Flower's strategies pause for a second."""


class _OrderedGrid:
    """Flower's grid, with the nodes in the order of the clients.

    Node ids are random, and Flower samples from the list of nodes: the order makes samples repeatable. On an engine
    without Flower there is no grid, and all nodes are listed.
    """

    def __init__(self, roster: Roster) -> None:
        self._grid = roster.grid
        self._nodes = roster.nodes
        self._looks = 0
        self._waits = 0
        self._looked = time.monotonic()

    def get_node_ids(self) -> Iterable[int]:
        before = self._looked
        self._looked = time.monotonic()
        self._looks += 1
        # A strategy that wants more nodes looks again and again. No node will come: the number of clients is fixed.
        # The time before the first look is no pause: the strategy may have computed.
        has_paused = self._looked - before > _PAUSE_SECONDS
        if self._looks > 1 and has_paused:
            self._waits += 1
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
    """Placeholder for the copy of a strategy that cannot be copied.

    Attributes:
        reason: Error of the attempt to copy.
    """

    reason: str


class FlowerAggregation:
    """Runs any `flwr.serverapp.strategy.Strategy`.

    The strategy samples the clients, with random numbers from the run's seed. The strategy does not decide about
    evaluation. Its memory cannot be saved.
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
        """Returns the assignments of the clients that the strategy samples, with FedProx's mu as the proximal term."""
        self._nodes = roster.nodes
        # Flower samples with Python's only generator. Each round has a seed, so that a repeated round samples alike.
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
            task = Task(proximal=float(settings.pop(records.PROXIMAL, 0.0)), settings=settings)
            assigned[clients[node]] = Assignment(adapters.with_tensors(tensors), task)
        return assigned

    def _settings(self, message: Message) -> dict[str, Any]:
        """Returns the settings in a message to a client, without the round.

        Raises:
            FederationFailed: The message has a record that clients do not know, or a setting for a mod, such as
                clipping for differential privacy, and the run has no mods, or the trunk trains adapters that no mod
                sees. Without this error, the run would silently do without the clipping.
        """
        name = type(self._strategy).__name__
        content = message.content
        if content.keys() != {ADAPTERS, records.CONFIG}:
            known = f"the records {ADAPTERS} and {records.CONFIG}"
            raise FederationFailed(f"{name} sends clients {', '.join(sorted(content))}; they read {known}")
        settings: dict[str, Any] = dict(content.config_records[records.CONFIG])
        settings.pop(records.ROUND, None)
        for_mods = sorted(settings.keys() - {records.PROXIMAL})
        if for_mods and not self._config.mods:
            raise FederationFailed(
                f"{name} sends clients the setting {for_mods[0]}, of which they know nothing: the half of it that "
                "works at the client is missing, and the run would go on without it; --mods names that half, such as "
                f"fixedclipping_mod; without mods, clients know {records.ROUND} and {records.PROXIMAL}"
            )
        if for_mods and "trunk" in aggregated_parts(self._config):
            raise FederationFailed(
                f"{name} sends clients the setting {for_mods[0]}, and the trunk trains a copy of its adapter for each "
                "client, which no mod sees; --share bottom,top leaves the copies out of the aggregate"
            )
        return settings

    def aggregate(
        self, round: int, adapters: Adapters, updates: Sequence[ClientUpdate], replies: Sequence[Reply]
    ) -> Adapters:
        """Returns the strategy's aggregate in float32. The strategy gets the weights of `--weights`."""
        pairs = zip(updates, replies, strict=True)
        messages = [self._message(update, reply) for update, reply in pairs]
        with named(self._strategy, round), records.named_run():
            arrays, _ = self._strategy.aggregate_train(round, messages)
        if arrays is None:
            raise FederationFailed(f"{type(self._strategy).__name__} returned no adapters in round {round}")
        tensors = records.from_arrays(arrays)
        adapters.check_fits(tensors, f"the strategy {type(self._strategy).__name__}")
        return adapters.with_tensors(tensors)

    def _message(self, update: ClientUpdate, reply: Reply) -> Message:
        """Returns an update in the form of a reply to Flower."""
        metrics = {name: reply.metrics[name] for name in FOR_STRATEGIES if name in reply.metrics}
        # Flower's strategies weight by the number of examples. The weights of `--weights` take its place.
        metrics[records.WEIGHT] = update.examples if update.weight is None else int(update.weight)
        content = RecordDict(
            {records.METRICS: MetricRecord(metrics), ADAPTERS: records.to_arrays(update.adapters.tensors)}
        )
        node = self._nodes[update.client].node
        with records.named_run():
            # Flower makes a reply from the message that it answers.
            question = Message(RecordDict(), dst_node_id=node, message_type="train")
            return Message(content, reply_to=question)

    def state(self) -> State:
        """Returns an empty state, since the strategy's memory cannot be read."""
        return {}

    def restore(self, state: State) -> None:
        """Refuses to go on from a checkpoint.

        Raises:
            FederationFailed: Always.
        """
        raise FederationFailed(f"what {type(self._strategy).__name__} remembers is not saved: such a run cannot go on")

    def memory(self) -> object:
        """Returns a copy of the strategy; a `_NotCopied` if copying fails, as for a strategy with a lock."""
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
        self._strategy = copy.deepcopy(memory)  # a copy again, as the round may be lost once more
