"""FedProx: FedAvg's numbers, and a task that says how near to stay."""

from __future__ import annotations

import pytest
import torch
from rounds import Round, by_hand, start

from fedsplit.updates import FACTORS, ClientInfo
from strategies.fedavg import FedAvg
from strategies.fedprox import FedProx


def test_factors_are_averaged_by_hand() -> None:
    """A = (1 * [2] + 3 * [6]) / 4 = [5]; B = (1 * [4] + 3 * [0]) / 4 = [1]."""
    result = by_hand(FedProx(), [([[2.0]], [[4.0]]), ([[6.0]], [[0.0]])], [1, 3], alpha=3.0)
    assert [tensor.item() for tensor in result.tensors.values()] == [5.0, 1.0]


def test_every_client_is_told_mu_and_begins_with_the_adapters() -> None:
    strategy, adapters = FedProx(mu=0.3), start()
    for client in range(3):
        assignment = strategy.broadcast({}, adapters, ClientInfo(client, 2))
        assert assignment.task.proximal == 0.3
        assert assignment.task.trains == FACTORS and assignment.task.control is None
        assert all(torch.equal(tensor, adapters.tensors[name]) for name, tensor in assignment.adapters.tensors.items())


def test_the_server_does_what_fedavg_does() -> None:
    runs = [Round.begin(strategy, start()) for strategy in (FedProx(), FedAvg())]
    for _ in range(3):
        prox, plain = [run.aggregate(run.train([2] * 4)) for run in runs]
        assert all(torch.equal(tensor, plain.tensors[name]) for name, tensor in prox.tensors.items())


@pytest.mark.parametrize("mu", [-0.1, float("nan"), float("inf")])
def test_a_mu_that_is_none_is_refused(mu) -> None:
    with pytest.raises(ValueError, match="mu is"):
        FedProx(mu)
