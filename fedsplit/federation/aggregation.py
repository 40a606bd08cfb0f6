"""Runs a strategy in a federation: assignments of the clients, and aggregation of the updates."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor

from fedsplit.federation.clients import FederationFailed, Roster
from fedsplit.federation.messages import Reply
from fedsplit.federation.strategy import FlowerLike, State, Strategy, broadcast, named, traits_of
from fedsplit.optimization.own_stage import own_defaults
from fedsplit.seeds import derive_seed
from fedsplit.settings.config import Config
from fedsplit.updates import Adapters, Assignment, ClientInfo, ClientUpdate, RefusedUpdate, Traits


def strategy_defaults(config: Config) -> dict[str, Any]:
    """Returns default arguments for the constructor of a strategy.

    Flower's strategies need the number of nodes. Without it they sample too few, or wait for more nodes forever.
    """
    return {
        **own_defaults(config),
        "fraction_train": config.fraction,
        "fraction_evaluate": 1.0,
        "min_train_nodes": 1,
        "min_evaluate_nodes": 1,
        "min_available_nodes": config.clients,
    }


class Aggregation(Protocol):
    """The port to a strategy during a run.

    Attributes:
        traits: Traits of the strategy.
    """

    traits: Traits

    def assign(self, round: int, adapters: Adapters, roster: Roster) -> dict[int, Assignment]:
        """Returns the assignments of the clients that train in a round."""
        ...

    def aggregate(
        self, round: int, adapters: Adapters, updates: Sequence[ClientUpdate], replies: Sequence[Reply]
    ) -> Adapters:
        """Returns the aggregated adapters, from which the next round starts.

        Args:
            round: The round.
            adapters: Adapters at the start of the round.
            updates: Updates in the order of the clients.
            replies: The clients' replies in the same order, without tensors.
        """
        ...

    def state(self) -> State:
        """Returns the strategy's state for a checkpoint."""
        ...

    def restore(self, state: State) -> None:
        """Goes on from a checkpoint."""
        ...

    def memory(self) -> object:
        """Returns the memory of the strategy, for `recall` in the same process."""
        ...

    def recall(self, memory: Any) -> None:
        """Restores a memory from `memory`."""
        ...


class OwnAggregation:
    """Runs a `fedsplit.federation.strategy.Strategy` on the sampled clients."""

    def __init__(self, strategy: Strategy, config: Config) -> None:
        """Holds the strategy's state between rounds.

        Args:
            strategy: The strategy.
            config: Configuration of the run, with the clients' ranks and the number of sampled clients.
        """
        self._strategy = strategy
        self._config = config
        self._state: State | None = None
        self.traits = traits_of(strategy)

    def assign(self, round: int, adapters: Adapters, roster: Roster) -> dict[int, Assignment]:
        """Returns the strategy's assignments for the sampled clients. A client that rests has none."""
        assigned = {}
        with named(self._strategy, round):
            state = self._begun(adapters)
            for client in sampled(self._config, round):
                # The rank in the settings, and not that of the adapters, which have the largest rank of all clients.
                info = ClientInfo(client, self._config.lora.rank_of(client))
                assignment = broadcast(self._strategy, state, adapters, info)
                if assignment is not None:
                    assigned[client] = self._checked(assignment, adapters)
        return assigned

    def _begun(self, adapters: Adapters) -> State:
        """Returns the strategy's state, and makes the initial state in the first round."""
        if self._state is None:
            state = self._strategy.init(adapters)
            _check_state(state)
            self._state = state
        return self._state

    def _checked(self, assignment: Assignment, adapters: Adapters) -> Assignment:
        """Checks an assignment, and converts its tensors to the types of the adapters.

        Raises:
            TypeError, RefusedUpdate: No client could train with the assignment.
        """
        if not isinstance(assignment, Assignment):
            raise TypeError(f"broadcast returned {type(assignment).__name__}, not an Assignment or None")
        given = assignment.adapters
        ranks = {given.rank(layer) for layer in given.complete} or {1}  # without a complete layer, no rank matters
        if len(ranks) > 1:
            listed = ", ".join(map(str, sorted(ranks)))
            raise RefusedUpdate(f"an assignment has the ranks {listed}, not one for all layers")
        adapters.with_rank(ranks.pop()).check_fits(given.tensors, "an assignment")
        return replace(assignment, adapters=_in_types_of(given, adapters))

    def aggregate(
        self, round: int, adapters: Adapters, updates: Sequence[ClientUpdate], replies: Sequence[Reply]
    ) -> Adapters:
        """Returns the strategy's aggregate."""
        name = f"the strategy {type(self._strategy).__name__}"
        with named(self._strategy, round):
            state, result = _checked_pair(self._strategy.aggregate(self._begun(adapters), adapters, updates))
            tensors = dict(result.tensors)  # inside, since reading a user's mapping may fail, too
        adapters.check_fits(tensors, name)
        result.check_folded(name)
        self._state = state  # after the checks: a refused round must leave the earlier state
        if result.folded and not self.traits.folds:
            raise FederationFailed(f"{name} wants to fold into base weights; its traits do not say so")
        return _in_types_of(result, adapters)

    def state(self) -> State:
        """Returns the strategy's state; empty before the first round."""
        return self._state or {}

    def restore(self, state: State) -> None:
        """Goes on from a checkpoint."""
        self._state = state

    def memory(self) -> object:
        """Returns the strategy's state; None before the first round. No strategy changes a state in place."""
        return self._state

    def recall(self, memory: Any) -> None:
        """Goes back to an earlier state."""
        self._state = memory


def _checked_pair(returned: Any) -> tuple[State, Adapters]:
    """Checks the value that a strategy's `aggregate` returned.

    Raises:
        TypeError: The value is no pair of a state and adapters.
    """
    is_pair = isinstance(returned, tuple) and len(returned) == 2
    if not is_pair or not isinstance(returned[1], Adapters):
        found = ", ".join(type(part).__name__ for part in returned) if isinstance(returned, tuple) else ""
        raise TypeError(f"aggregate returned {found or type(returned).__name__}, not a state and Adapters")
    state, adapters = returned
    _check_state(state)
    return state, adapters


def _check_state(state: object) -> None:
    """Checks that a strategy's state can be saved.

    Raises:
        TypeError: The state is no mapping of names to tensors.
    """
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise TypeError(f"its state is {type(state).__name__}, not a mapping of names to tensors")
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} in its state is {type(value).__name__}, not a tensor")


def _in_types_of(given: Adapters, adapters: Adapters) -> Adapters:
    """Returns `given` with the tensor types of `adapters`."""
    # A strategy may compute in float64. Messages, checkpoints and clients expect the types of the adapters.
    tensors = {}
    for name, tensor in given.tensors.items():
        tensors[name] = tensor.to(adapters.tensors[name].dtype)
    return replace(given, tensors=tensors)


def sampled(config: Config, round: int) -> list[int]:
    """Returns the clients that are asked to train in a round. They depend on the seed only."""
    # Another generator than Python's common one, from which user code may draw.
    generator = random.Random(derive_seed(config.seed, "sample", round))
    return sorted(generator.sample(range(config.clients), config.asked))


def make_aggregation(strategy: Strategy | FlowerLike, config: Config) -> Aggregation:
    """Returns the aggregation for a strategy of fedsplit's form or of Flower's."""
    if isinstance(strategy, FlowerLike):
        from fedsplit.federation.flower_strategy import FlowerAggregation  # imports Flower, which takes seconds

        return FlowerAggregation(strategy, config)
    return OwnAggregation(strategy, config)
