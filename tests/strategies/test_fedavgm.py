"""FedAvgM: momentum by hand, and the numbers of Flower."""

from __future__ import annotations

import pytest
import torch
from flower_rounds import assert_equal_rounds, single, two_rounds
from flwr.serverapp.strategy import FedAvgM as Flowers
from rounds import Round, start

from fedsplit.updates import ClientUpdate
from strategies.fedavg import FedAvg
from strategies.fedavgm import FedAvgM

A = "l.lora_A.weight"


def test_two_rounds_by_hand() -> None:
    """D = (1 * 4 + 3 * 8) / 4 = 7, m = 7, A = 0.5 * 7 = 3.5; then D = 7 - 3.5, m = 0.5 * 7 + 3.5 = 7, A = 3.5 + 3.5."""
    assert two_rounds(FedAvgM(server_learning_rate=0.5, server_momentum=0.5)) == [3.5, 7.0]


def test_by_default_it_is_fedavg() -> None:
    runs = [Round.begin(strategy, start()) for strategy in (FedAvgM(), FedAvg())]
    for _ in range(3):
        updates = runs[0].train([2] * 4)
        one, other = [run.aggregate(updates) for run in runs]
        for name, tensor in one.tensors.items():
            torch.testing.assert_close(tensor, other.tensors[name], rtol=1e-6, atol=1e-7)


def test_momentum_goes_on_when_clients_stand_still() -> None:
    """After a change of 8 with momentum 0.5, clients that return what they were given move it by 4, 2, 1."""
    run = Round.begin(FedAvgM(server_momentum=0.5), single(0.0))
    run.aggregate([ClientUpdate(0, single(8.0), 1)])
    seen = [run.aggregate([ClientUpdate(0, run.adapters, 1)]).tensors[A].item() for _ in range(3)]
    assert seen == [12.0, 14.0, 15.0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"server_momentum": 0.9},
        {"server_momentum": 0.5, "server_learning_rate": 0.3},
        {"server_learning_rate": 2.0},
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_several_rounds_are_flowers(options, seed) -> None:
    assert_equal_rounds(FedAvgM(**options), Flowers(fraction_train=0.0, **options), clients=4, seed=seed)
