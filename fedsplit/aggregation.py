"""A strategy at work in a federation: its decisions as Flower's messages, their replies as its updates."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedsplit import records
from fedsplit.strategy import State, Strategy
from fedsplit.updates import Adapters, ClientUpdate


class FederationFailed(Exception):
    """The run cannot go on; says why."""


def strategy_defaults(clients: int) -> dict[str, Any]:
    """What Flower's strategies need to be told, or they sample too few nodes, or wait for ever for more."""
    return {
        "fraction_train": 1.0,
        "fraction_evaluate": 1.0,
        "min_train_nodes": 1,
        "min_evaluate_nodes": 1,
        "min_available_nodes": clients,
    }


@dataclass(frozen=True)
class Member:
    """A client as the server knows it: its node's id in this run, and its name."""

    node: int
    name: str


class Aggregation(Protocol):
    """A strategy at work in a federation."""

    def messages(self, round: int, adapters: Adapters, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Who trains in this round, and from what."""
        ...

    def aggregate(
        self, round: int, adapters: Adapters, replies: list[Message], updates: list[ClientUpdate]
    ) -> Adapters:
        """What the next round starts from; replies and updates are those of the clients, in their order."""
        ...


@contextlib.contextmanager
def _named(strategy: object, round: int) -> Iterator[None]:
    """Says whose code it was, and where, if a strategy raises something."""
    try:
        yield
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {error} ({Path(frame.filename).name}, line {frame.lineno})"
        raise FederationFailed(f"the strategy {type(strategy).__name__} failed in round {round}: {what}") from error


class OwnAggregation:
    """Runs a `fedsplit.strategy.Strategy`: every client trains in every round."""

    def __init__(self, strategy: Strategy, members: Sequence[Member]) -> None:
        """Holds the strategy's state between rounds."""
        self._strategy, self._members = strategy, members
        self._state: State | None = None

    def messages(self, round: int, adapters: Adapters, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """The same adapters to every member."""
        content = RecordDict({records.ARRAYS: records.to_arrays(adapters.tensors), records.CONFIG: config})
        return [records.message_to(member.node, MessageType.TRAIN, content) for member in self._members]

    def aggregate(
        self, round: int, adapters: Adapters, replies: list[Message], updates: list[ClientUpdate]
    ) -> Adapters:
        """The strategy's own aggregation."""
        with _named(self._strategy, round):
            state = self._strategy.init(adapters) if self._state is None else self._state
            self._state, result = self._strategy.aggregate(state, adapters, updates)
            tensors = dict(result.tensors)
        adapters.check_fits(tensors, f"the strategy {type(self._strategy).__name__}")
        return result


class FlowerAggregation:
    """Runs any `flwr.serverapp.strategy.Strategy`: to it, the adapters are ordinary arrays.

    Its sampling is its own. Evaluation is not left to it: every client evaluates after every round.
    """

    def __init__(self, strategy: FlowerStrategy) -> None:
        """Wraps a strategy."""
        self._strategy = strategy

    def messages(self, round: int, adapters: Adapters, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """The strategy's own choice."""
        with _named(self._strategy, round):
            return list(self._strategy.configure_train(round, records.to_arrays(adapters.tensors), config, grid))

    def aggregate(
        self, round: int, adapters: Adapters, replies: list[Message], updates: list[ClientUpdate]
    ) -> Adapters:
        """The strategy's own aggregation, back in float32."""
        with _named(self._strategy, round):
            arrays, _ = self._strategy.aggregate_train(round, replies)
        if arrays is None:
            raise FederationFailed(f"{type(self._strategy).__name__} returned no adapters in round {round}")
        tensors = records.from_arrays(arrays)
        adapters.check_fits(tensors, f"the strategy {type(self._strategy).__name__}")
        return adapters.with_tensors(tensors)


def make_aggregation(strategy: Strategy | FlowerStrategy, members: Sequence[Member]) -> Aggregation:
    """The aggregation that a strategy needs: ours or Flower's."""
    if isinstance(strategy, FlowerStrategy):
        return FlowerAggregation(strategy)
    return OwnAggregation(strategy, members)
