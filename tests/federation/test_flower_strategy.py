"""One of Flower's strategies at work: it sees arrays and nodes, and draws from the run's seed."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from flwr.serverapp.strategy import FedAvg

from fedsplit.federation.aggregation import strategy_defaults
from fedsplit.federation.clients import ClientNode, FederationFailed
from fedsplit.federation.flower_strategy import FlowerAggregation
from fedsplit.federation.messages import trained
from fedsplit.federation.replies import without_tensors
from fedsplit.federation.strategy import load_strategy
from fedsplit.scores import Score
from fedsplit.settings.config import Config
from fedsplit.updates import Adapters, ClientUpdate, Layer

START = Adapters({"l.lora_A.weight": torch.ones(1, 2), "l.lora_B.weight": torch.zeros(2, 1)}, {"l": Layer(1.0, False)})
CONFIG = Config(clients=6, fraction=0.5)


@dataclass
class Roster:
    """Six clients at nodes that are not in their order."""

    nodes: list[ClientNode] = field(default_factory=lambda: [ClientNode(90 - n, f"owner {n}") for n in range(6)])
    grid: Any = None


def aggregation_of(name: str, **options: Any) -> FlowerAggregation:
    return FlowerAggregation(
        load_strategy(f"flwr.serverapp.strategy:{name}", options, strategy_defaults(CONFIG)), CONFIG
    )


def aggregate(aggregation: FlowerAggregation, round: int, by: float = 1.0) -> Adapters:
    """Has two clients send adapters that have changed, the second by twice as much."""
    updates = []
    for client in (0, 1):
        tensors = {name: tensor + by * (1 + client) for name, tensor in START.tensors.items()}
        updates.append(ClientUpdate(client, START.with_tensors(tensors), 4, 64, 1.0, weight=1.0 + 2 * client))
    replies = [without_tensors(trained(update, (), Score(), 0)) for update in updates]
    return aggregation.aggregate(round, START, updates, replies)


def test_the_seed_and_the_round_decide_who_is_sampled() -> None:
    """And no random number of the caller's is used up."""
    random.seed(3)
    before = random.getstate()
    rounds = [sorted(aggregation_of("FedAvg").assign(round, START, Roster())) for round in range(1, 9)]
    assert rounds == [sorted(aggregation_of("FedAvg").assign(round, START, Roster())) for round in range(1, 9)]
    assert all(len(clients) == 3 for clients in rounds) and len({*map(tuple, rounds)}) > 3
    assert random.getstate() == before


def test_flowers_proximal_term_becomes_ours() -> None:
    assigned = aggregation_of("FedProx", proximal_mu=0.25).assign(1, START, Roster())
    assert {one.task.proximal for one in assigned.values()} == {0.25}
    assert all(torch.equal(one.adapters.tensors[n], t) for one in assigned.values() for n, t in START.tensors.items())


def test_updates_count_by_their_weight_and_come_back_in_float32() -> None:
    aggregation = aggregation_of("FedAvg")
    aggregation.assign(1, START, Roster())
    result = aggregate(aggregation, 1)
    assert torch.allclose(result.tensors["l.lora_A.weight"], torch.full((1, 2), 1 + (1 * 1 + 2 * 3) / 4))
    assert {tensor.dtype for tensor in result.tensors.values()} == {torch.float32}


def test_what_it_remembers_can_be_recalled() -> None:
    """FedAdam's moments: the same round again gives the same, and from the memory kept it can be had twice."""
    aggregation = aggregation_of("FedAdam", eta=0.1)
    aggregation.assign(1, START, Roster())
    aggregate(aggregation, 1)
    memory = aggregation.memory()
    first = aggregate(aggregation, 2, by=3.0)
    further = aggregate(aggregation, 2, by=3.0)
    assert not torch.equal(first.tensors["l.lora_A.weight"], further.tensors["l.lora_A.weight"])
    for _ in range(2):
        aggregation.recall(memory)
        again = aggregate(aggregation, 2, by=3.0)
        assert torch.equal(first.tensors["l.lora_A.weight"], again.tensors["l.lora_A.weight"])


def test_a_strategy_that_cannot_be_copied_plays_and_cannot_be_recalled() -> None:
    class Locked(FedAvg):
        def __init__(self) -> None:
            super().__init__(min_available_nodes=6, min_train_nodes=1, fraction_train=0.5)
            self.lock = threading.Lock()

    aggregation = FlowerAggregation(Locked(), CONFIG)
    memory = aggregation.memory()
    assert len(aggregation.assign(1, START, Roster())) == 3
    with pytest.raises(FederationFailed, match=r"cannot be played again: Locked cannot be copied \(TypeError"):
        aggregation.recall(memory)


def test_it_has_no_state_to_go_on_from() -> None:
    assert aggregation_of("FedAvg").state() == {}
    with pytest.raises(FederationFailed, match="FedAvg remembers is not saved: such a run cannot go on"):
        aggregation_of("FedAvg").restore({})


def test_only_nodes_that_are_there_are_asked() -> None:
    class Grid:
        def get_node_ids(self) -> list[int]:
            return [90, 88, 86, 12]

    strategy = FedAvg(min_available_nodes=1, min_train_nodes=1, fraction_train=1.0)
    assigned = FlowerAggregation(strategy, CONFIG).assign(1, START, Roster(grid=Grid()))
    assert sorted(assigned) == [0, 2, 4]
