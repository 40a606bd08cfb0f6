"""A strategy at work: state is carried from round to round, and stays out of the strategy."""

from __future__ import annotations

import pytest
import torch
from flwr.app import ConfigRecord

from fedsplit.aggregation import (
    FederationFailed,
    FlowerAggregation,
    Member,
    OwnAggregation,
    make_aggregation,
    strategy_defaults,
)
from fedsplit.strategy import load_strategy
from fedsplit.updates import Adapters, ClientUpdate, Layer, RefusedUpdate

START = Adapters({"l.lora_A.weight": torch.zeros(1, 2), "l.lora_B.weight": torch.zeros(2, 1)}, {"l": Layer(1.0, False)})


class Counting:
    """Adds the number of rounds so far."""

    def init(self, adapters):
        return {"rounds": torch.zeros(())}

    def aggregate(self, state, adapters, updates):
        rounds = state["rounds"] + 1
        return {"rounds": rounds}, adapters.with_tensors({n: t + rounds for n, t in adapters.tensors.items()})


def test_state_goes_from_round_to_round() -> None:
    aggregation = OwnAggregation(Counting(), [])
    adapters = START
    for round in (1, 2, 3):
        adapters = aggregation.aggregate(round, adapters, [], [ClientUpdate(0, START, 1)])
    assert set(adapters.tensors["l.lora_A.weight"].flatten().tolist()) == {1.0 + 2.0 + 3.0}


def test_every_member_gets_the_same_adapters() -> None:
    members = [Member(11, "ann"), Member(12, "bob")]
    messages = list(OwnAggregation(Counting(), members).messages(1, START, ConfigRecord({"x": 1}), None))
    assert [message.metadata.dst_node_id for message in messages] == [11, 12]
    assert messages[0].content["arrays"] is messages[1].content["arrays"]


def test_the_kind_of_strategy_decides() -> None:
    flower = load_strategy("flwr.serverapp.strategy:FedAvg", {}, strategy_defaults(2))
    assert isinstance(make_aggregation(flower, []), FlowerAggregation)
    assert isinstance(make_aggregation(Counting(), []), OwnAggregation)


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
        OwnAggregation(Broken(result), []).aggregate(3, START, [], [ClientUpdate(0, START, 1)])
    assert "\n" not in str(caught.value)
