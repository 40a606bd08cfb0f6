"""A strategy at work: state is carried from round to round, and stays out of the strategy."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedsplit.aggregation import (
    FederationFailed,
    FlowerAggregation,
    OwnAggregation,
    make_aggregation,
    sampled,
    strategy_defaults,
)
from fedsplit.config import Config
from fedsplit.strategy import load_strategy
from fedsplit.updates import Adapters, Assignment, ClientUpdate, Layer, RefusedUpdate, Task

START = Adapters({"l.lora_A.weight": torch.zeros(1, 2), "l.lora_B.weight": torch.zeros(2, 1)}, {"l": Layer(1.0, False)})


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
        adapters = aggregation.aggregate(round, adapters, [], [ClientUpdate(0, START, 1)])
    assert set(adapters.tensors["l.lora_A.weight"].flatten().tolist()) == {1.0 + 2.0 + 3.0}


def test_everybody_gets_the_adapters_unless_the_strategy_says_otherwise() -> None:
    config = Config(clients=3)
    assigned = OwnAggregation(Counting(), config).assign(1, START, None)
    assert sorted(assigned) == [0, 1, 2]
    assert all(one.adapters.tensors.keys() == START.tensors.keys() for one in assigned.values())

    class Resting(Counting):
        def broadcast(self, state, adapters, client):
            return None if client.client == 1 else Assignment(adapters, Task(proximal=client.rank))

    assigned = OwnAggregation(Resting(), config).assign(1, START, None)
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
        (lambda a: None, FederationFailed, "Broken failed in round 3: AttributeError"),
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
        OwnAggregation(Broken(result), Config()).aggregate(3, START, [], [ClientUpdate(0, START, 1)])
    assert "\n" not in str(caught.value)
