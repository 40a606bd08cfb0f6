"""A strategy at work in a federation: its decisions as Flower's messages, their replies as its updates."""

from __future__ import annotations

import contextlib
import random
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerStrategy
from torch import Tensor

from fedsplit.config import Config
from fedsplit.federation import records
from fedsplit.federation.strategy import State, Strategy, broadcast, traits_of
from fedsplit.optimization.own_stage import own_defaults
from fedsplit.seeds import derive_seed
from fedsplit.updates import Adapters, Assignment, ClientInfo, ClientUpdate, RefusedUpdate, Task, Traits


class FederationFailed(Exception):
    """The run cannot go on; says why."""


def strategy_defaults(config: Config) -> dict[str, Any]:
    """What strategies are told where they ask for it.

    Flower's need to know how many nodes there are, or they sample too few, or wait for ever for more.
    """
    return {
        **own_defaults(config),
        "fraction_train": config.fraction,
        "fraction_evaluate": 1.0,
        "min_train_nodes": 1,
        "min_evaluate_nodes": 1,
        "min_available_nodes": config.clients,
    }


@dataclass(frozen=True)
class Member:
    """A client as the server knows it: its node's id in this run, and its name."""

    node: int
    name: str


class Aggregation(Protocol):
    """A strategy at work in a federation.

    Attributes:
        traits: Of the strategy.
    """

    traits: Traits

    def assign(self, round: int, adapters: Adapters, grid: Grid) -> dict[int, Assignment]:
        """Who trains in this round, and from what, by client."""
        ...

    def aggregate(
        self, round: int, adapters: Adapters, replies: list[Message], updates: list[ClientUpdate]
    ) -> Adapters:
        """What the next round starts from; replies and updates are those of the clients, in their order."""
        ...

    def state(self) -> State:
        """What the strategy remembers."""
        ...

    def restore(self, state: State) -> None:
        """Goes on from what `state` told in another life."""
        ...


@contextlib.contextmanager
def _named(strategy: object, round: int) -> Iterator[None]:
    """Says whose code it was, and where, if a strategy raises something, or would end the program."""
    try:
        yield
    except FederationFailed:
        raise
    except (Exception, SystemExit) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {error} ({Path(frame.filename).name}, line {frame.lineno})"
        raise FederationFailed(f"the strategy {type(strategy).__name__} failed in round {round}: {what}") from error


class OwnAggregation:
    """Runs a `fedsplit.federation.strategy.Strategy` on the clients that are sampled."""

    def __init__(self, strategy: Strategy, config: Config) -> None:
        """Holds the strategy's state between rounds.

        Args:
            strategy: The strategy.
            config: The run's: who has which rank, and how many clients are sampled.
        """
        self._strategy, self._config = strategy, config
        self._state: State | None = None
        self.traits = traits_of(strategy)

    def _begun(self, adapters: Adapters) -> State:
        if self._state is None:
            state = self._strategy.init(adapters)
            _check_state(state)
            self._state = state
        return self._state

    def assign(self, round: int, adapters: Adapters, grid: Grid) -> dict[int, Assignment]:
        """What the strategy gives to each client that is sampled, and does not rest."""
        with _named(self._strategy, round):
            state = self._begun(adapters)
            infos = [ClientInfo(client, self._config.lora.rank_of(client)) for client in sampled(self._config, round)]
            found = {info.client: broadcast(self._strategy, state, adapters, info) for info in infos}
            return {client: self._checked(given, adapters) for client, given in found.items() if given is not None}

    def _checked(self, assignment: Assignment, adapters: Adapters) -> Assignment:
        """What a strategy gives to a client, in the adapters' types, if a client can train from it.

        Raises:
            TypeError, RefusedUpdate: It cannot.
        """
        if not isinstance(assignment, Assignment):
            raise TypeError(f"broadcast returned {type(assignment).__name__}, not an Assignment or None")
        given = assignment.adapters
        ranks = {given.rank(layer) for layer in given.complete} or {1}
        if len(ranks) > 1:
            raise RefusedUpdate(
                f"an assignment has the ranks {', '.join(map(str, sorted(ranks)))}, not one for all layers"
            )
        adapters.with_rank(ranks.pop()).check_fits(given.tensors, "an assignment")
        return replace(assignment, adapters=_in_types_of(given, adapters))

    def aggregate(
        self, round: int, adapters: Adapters, replies: list[Message], updates: list[ClientUpdate]
    ) -> Adapters:
        """The strategy's own aggregation."""
        name = f"the strategy {type(self._strategy).__name__}"
        with _named(self._strategy, round):
            state, result = self._strategy.aggregate(self._begun(adapters), adapters, updates)
            _check_state(state)
            tensors = dict(result.tensors)
        adapters.check_fits(tensors, name)
        result.check_folded(name)
        self._state = state
        if result.folded and not self.traits.folds:
            raise FederationFailed(f"{name} wants to fold into base weights; its traits do not say so")
        return _in_types_of(result, adapters)

    def state(self) -> State:
        """What the strategy remembers."""
        return self._state or {}

    def restore(self, state: State) -> None:
        """Goes on from what `state` told in another life."""
        self._state = state


def _check_state(state: object) -> None:
    """Makes sure that what a strategy remembers can be saved.

    Raises:
        TypeError: It cannot.
    """
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise TypeError(f"its state is {type(state).__name__}, not a mapping of names to tensors")
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} in its state is {type(value).__name__}, not a tensor")


def _in_types_of(given: Adapters, adapters: Adapters) -> Adapters:
    """Adapters whose tensors have the types of others of the same names."""
    return replace(given, tensors={n: t.to(adapters.tensors[n].dtype) for n, t in given.tensors.items()})


def sampled(config: Config, round: int) -> list[int]:
    """The clients that train in a round; the seed alone decides."""
    generator = random.Random(derive_seed(config.seed, "sample", round))
    return sorted(generator.sample(range(config.clients), config.sampled))


WAITING_LOOKS = 3
"""How often a strategy may pause and look again which nodes there are; there never are more than at the first time."""

MOST_LOOKS = 1000
"""How often it may look at all in one round: a strategy that waits without a pause comes to this soon."""

_PAUSE_SECONDS = 0.5
"""Time between two looks from which on a strategy waits; Flower's own sleep a second."""


class _OrderedGrid:
    """Flower's grid, with nodes in the order of the clients: their ids are random, and Flower draws from a list."""

    def __init__(self, grid: Grid, members: Sequence[Member]) -> None:
        self._grid, self._members = grid, members
        self._looks = self._waits = 0
        self._looked = time.monotonic()

    def get_node_ids(self) -> list[int]:
        before, self._looked = self._looked, time.monotonic()
        self._looks += 1
        self._waits += self._looks > 1 and self._looked - before > _PAUSE_SECONDS
        if self._waits >= WAITING_LOOKS or self._looks > MOST_LOOKS:
            raise FederationFailed(f"the strategy waits for more nodes than the {len(self._members)} that there are")
        there = set(self._grid.get_node_ids())
        return [member.node for member in self._members if member.node in there]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)


class FlowerAggregation:
    """Runs any `flwr.serverapp.strategy.Strategy`: to it, the adapters are ordinary arrays.

    Its sampling is its own, but drawn from the run's seed. Evaluation is not left to it: every client evaluates
    after every round. What it remembers is its own, and cannot be saved.
    """

    traits = Traits()

    def __init__(self, strategy: FlowerStrategy, config: Config, members: Sequence[Member]) -> None:
        """Wraps a strategy.

        Args:
            strategy: The strategy.
            config: The run's.
            members: The clients by number; they may not be known yet.
        """
        self._strategy, self._config, self._members = strategy, config, members

    def assign(self, round: int, adapters: Adapters, grid: Grid) -> dict[int, Assignment]:
        """The strategy's own choice; of its settings, FedProx's mu is heeded."""
        drawn = random.getstate()
        random.seed(derive_seed(self._config.seed, "sample", round))
        try:
            with _named(self._strategy, round):
                view: Any = _OrderedGrid(grid, self._members)
                config = ConfigRecord({records.ROUND: round})
                arrays = records.to_arrays(adapters.tensors)
                messages = list(self._strategy.configure_train(round, arrays, config, view))
        finally:
            random.setstate(drawn)
        clients = {member.node: client for client, member in enumerate(self._members)}
        found = {}
        for message in messages:
            if message.metadata.dst_node_id not in clients:
                raise FederationFailed(f"the strategy sent a message to a node that is no client: {message.metadata}")
            asked = self._asked(message)
            given = adapters.with_tensors(records.tensors_of(message))
            task = Task(proximal=float(asked.get(records.PROXIMAL, 0.0)))
            found[clients[message.metadata.dst_node_id]] = Assignment(given, task)
        return found

    def _asked(self, message: Message) -> dict[str, Any]:
        """What a message asks of a client beside training.

        Raises:
            FederationFailed: It asks for what our clients do not do, such as clipping for differential privacy: the
                run would go on without it.
        """
        name, content = type(self._strategy).__name__, message.content
        if content.keys() != {records.ARRAYS, records.CONFIG}:
            words = f"the records {records.ARRAYS} and {records.CONFIG}"
            raise FederationFailed(f"{name} sends clients {', '.join(sorted(content))}; they read {words}")
        asked = dict(content.config_records[records.CONFIG])
        if unknown := sorted(asked.keys() - {records.ROUND, records.PROXIMAL}):
            known = f"{records.ROUND} and {records.PROXIMAL}"
            raise FederationFailed(
                f"{name} sends clients the setting {unknown[0]}, of which they know nothing: the half of it that works "
                f"at the client is missing, and the run would go on without it; clients know {known}"
            )
        return asked

    def aggregate(
        self, round: int, adapters: Adapters, replies: list[Message], updates: list[ClientUpdate]
    ) -> Adapters:
        """The strategy's own aggregation, back in float32; what it weights by is `--weights`."""
        for reply, update in zip(replies, updates, strict=True):
            metrics = reply.content.metric_records[records.METRICS]
            metrics[records.WEIGHT] = update.examples if update.weight is None else int(update.weight)
            arrays = records.to_arrays(update.adapters.tensors)
            reply.content = RecordDict({records.METRICS: metrics, records.ARRAYS: arrays})
        with _named(self._strategy, round):
            found, _ = self._strategy.aggregate_train(round, replies)
        if found is None:
            raise FederationFailed(f"{type(self._strategy).__name__} returned no adapters in round {round}")
        tensors = records.from_arrays(found)
        adapters.check_fits(tensors, f"the strategy {type(self._strategy).__name__}")
        return adapters.with_tensors(tensors)

    def state(self) -> State:
        """Nothing that could be read."""
        return {}

    def restore(self, state: State) -> None:
        """Not possible."""
        raise FederationFailed(f"what {type(self._strategy).__name__} remembers is not saved: such a run cannot go on")


def make_aggregation(
    strategy: Strategy | FlowerStrategy, config: Config, members: Sequence[Member] = ()
) -> OwnAggregation | FlowerAggregation:
    """The aggregation that a strategy needs: ours or Flower's."""
    if isinstance(strategy, FlowerStrategy):
        return FlowerAggregation(strategy, config, members)
    return OwnAggregation(strategy, config)
