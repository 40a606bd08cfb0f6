"""A strategy at work: state is carried from round to round, and stays out of the strategy."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch

from fedsplit.federation.aggregation import OwnAggregation, make_aggregation, sampled, strategy_defaults
from fedsplit.federation.clients import ClientNode, FederationFailed
from fedsplit.federation.flower_strategy import FlowerAggregation
from fedsplit.federation.strategy import load_strategy
from fedsplit.settings.config import Config
from fedsplit.updates import Adapters, Assignment, ClientUpdate, Layer, RefusedUpdate, Task

START = Adapters({"l.lora_A.weight": torch.zeros(1, 2), "l.lora_B.weight": torch.zeros(2, 1)}, {"l": Layer(1.0, False)})


@dataclass
class Roster:
    """No clients: a strategy of ours is told their numbers by the configuration."""

    nodes: list[ClientNode] = field(default_factory=list)
    grid: None = None


class Counting:
    """Adds the number of rounds so far."""

    def init(self, adapters):
        return {"rounds": torch.zeros(())}

    def aggregate(self, state, adapters, updates):
        rounds = state["rounds"] + 1
        return {"rounds": rounds}, adapters.with_tensors({n: t + rounds for n, t in adapters.tensors.items()})


def test_state_goes_from_round_to_round() -> None:
    aggregation = OwnAggregation(Counting(), Config())
    adapters = START
    for round in (1, 2, 3):
        adapters = aggregation.aggregate(round, adapters, [ClientUpdate(0, START, 1)], [])
    assert set(adapters.tensors["l.lora_A.weight"].flatten().tolist()) == {1.0 + 2.0 + 3.0}


def test_everybody_gets_the_adapters_unless_the_strategy_says_otherwise() -> None:
    config = Config(clients=3)
    assigned = OwnAggregation(Counting(), config).assign(1, START, Roster())
    assert sorted(assigned) == [0, 1, 2]
    assert all(one.adapters.tensors.keys() == START.tensors.keys() for one in assigned.values())

    class Resting(Counting):
        def broadcast(self, state, adapters, client):
            return None if client.client == 1 else Assignment(adapters, Task(proximal=client.rank))

    assigned = OwnAggregation(Resting(), config).assign(1, START, Roster())
    assert {client: one.task.proximal for client, one in assigned.items()} == {0: 8, 2: 8}


def test_the_seed_alone_decides_who_is_sampled() -> None:
    config = Config(clients=10, fraction=0.5)
    rounds = [sampled(config, round) for round in range(1, 9)]
    assert rounds == [sampled(config, round) for round in range(1, 9)]
    assert all(len(set(clients)) == 5 for clients in rounds) and len({*map(tuple, rounds)}) > 4
    assert rounds != [sampled(replace(config, seed=1), round) for round in range(1, 9)]
    assert sampled(replace(config, fraction=0.01), 1) and len(sampled(replace(config, fraction=0.25), 1)) == 3
    assert {client for round in range(1, 40) for client in sampled(config, round)} == set(range(10))


def test_the_kind_of_strategy_decides() -> None:
    flower = load_strategy("flwr.serverapp.strategy:FedAvg", {}, strategy_defaults(Config(clients=2)))
    assert isinstance(make_aggregation(flower, Config()), FlowerAggregation)
    assert isinstance(make_aggregation(Counting(), Config()), OwnAggregation)


class Broken(Counting):
    def __init__(self, result) -> None:
        self.result = result

    def aggregate(self, state, adapters, updates):
        return state, self.result(adapters)


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (
            lambda a: 1 / 0,
            FederationFailed,
            r"Broken failed in round 3: ZeroDivisionError: .* \(test_aggregation.py, line",
        ),
        (
            lambda a: None,
            FederationFailed,
            r"Broken failed .*: TypeError: aggregate returned dict, NoneType, not a state and Adapters$",
        ),
        (lambda a: a.with_tensors({}), RefusedUpdate, "the strategy Broken sent other layers"),
        (
            lambda a: a.with_tensors({n: t / 0 for n, t in a.tensors.items()}),
            RefusedUpdate,
            "the strategy Broken sent NaN",
        ),
    ],
)
def test_a_strategy_that_fails_is_named(result, error, message) -> None:
    with pytest.raises(error, match=message) as caught:
        OwnAggregation(Broken(result), Config()).aggregate(3, START, [ClientUpdate(0, START, 1)], [])
    assert "\n" not in str(caught.value)


class Giving(Counting):
    """Gives what it is told to give."""

    def __init__(self, given=None, state=None) -> None:
        self.given, self.state = given, state

    def init(self, adapters):
        return {} if self.state is None else self.state

    def broadcast(self, state, adapters, client):
        return self.given(adapters)

    def aggregate(self, state, adapters, updates):
        return self.init(adapters), adapters


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda a: a, "Giving failed in round 2: TypeError: broadcast returned Adapters, not an Assignment or None"),
        (lambda a: Assignment(a.with_tensors({})), "RefusedUpdate: an assignment sent other layers"),
        (
            lambda a: Assignment(a.with_tensors({n: t.repeat(2, 2) for n, t in a.tensors.items()})),
            r"an assignment sent l.lora_A.weight with shape \(2, 4\)",
        ),
        (lambda a: Assignment(a.with_tensors({n: t.long() for n, t in a.tensors.items()})), "as torch.int64, not as"),
    ],
)
def test_an_assignment_that_nobody_can_train_from_is_the_strategys_fault(given, message) -> None:
    with pytest.raises(FederationFailed, match=message) as caught:
        OwnAggregation(Giving(given), Config(clients=2)).assign(2, START, Roster())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("hello", "its state is str, not a mapping of names to tensors"),
        ({"n": 3}, "n in its state is int, not a tensor"),
        ({3: torch.zeros(1)}, "its state is dict, not a mapping of names to tensors"),
    ],
)
def test_a_state_that_cannot_be_saved_is_the_strategys_fault(state, message) -> None:
    with pytest.raises(FederationFailed, match=f"Giving failed in round 1: TypeError: {message}"):
        OwnAggregation(Giving(state=state), Config()).aggregate(1, START, [ClientUpdate(0, START, 1)], [])


def test_other_types_of_numbers_become_those_of_the_adapters() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        given = START.with_tensors({n: (t + 1).to(dtype) for n, t in START.tensors.items()})
        assigned = OwnAggregation(Giving(lambda a, g=given: Assignment(g)), Config(clients=1)).assign(
            1, START, Roster()
        )
        result = OwnAggregation(Broken(lambda a, g=given: g), Config()).aggregate(
            1, START, [ClientUpdate(0, START, 1)], []
        )
        for found in (assigned[0].adapters, result):
            assert {tensor.dtype for tensor in found.tensors.values()} == {torch.float32}
