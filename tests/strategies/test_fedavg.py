"""FedAvg against numbers worked by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.updates import Adapters, ClientUpdate, Layer
from strategies.fedavg import FedAvg

LAYERS = {"l": Layer(alpha=2.0, transposed=False)}


def adapters(a: list[list[float]], b: list[list[float]]) -> Adapters:
    return Adapters({"l.lora_A.weight": torch.tensor(a), "l.lora_B.weight": torch.tensor(b)}, LAYERS)


START = adapters([[0.0, 0.0]], [[0.0], [0.0]])


def aggregate(*updates: ClientUpdate) -> Adapters:
    strategy = FedAvg()
    state, result = strategy.aggregate(strategy.init(START), START, updates)
    assert state == {}
    return result


def test_weights_are_examples() -> None:
    """A = (1 * [1, 2] + 3 * [5, -2]) / 4 = [4, -1]; B = (1 * [8, 0] + 3 * [0, 4]) / 4 = [2, 3]."""
    result = aggregate(
        ClientUpdate(0, adapters([[1.0, 2.0]], [[8.0], [0.0]]), examples=1),
        ClientUpdate(1, adapters([[5.0, -2.0]], [[0.0], [4.0]]), examples=3),
    )
    assert result.tensors["l.lora_A.weight"].tolist() == [[4.0, -1.0]]
    assert result.tensors["l.lora_B.weight"].tolist() == [[2.0], [3.0]]
    assert result.layers == LAYERS


def test_a_client_without_examples_counts_for_nothing() -> None:
    one = ClientUpdate(0, adapters([[1.0, 2.0]], [[3.0], [4.0]]), examples=2)
    none = ClientUpdate(1, adapters([[9.0, 9.0]], [[9.0], [9.0]]), examples=0)
    assert torch.equal(aggregate(one, none).tensors["l.lora_A.weight"], one.adapters.tensors["l.lora_A.weight"])
    with pytest.raises(ValueError, match="no client trained"):
        aggregate(none)


@given(
    st.lists(
        st.tuples(st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=4), st.integers(1, 1000)),
        min_size=1,
        max_size=4,
    )
)
def test_the_order_of_clients_changes_no_bit_and_scale_nothing(clients: list[tuple[list[float], int]]) -> None:
    def updates(factor: int) -> list[ClientUpdate]:
        return [
            ClientUpdate(number, adapters([v[:2]], [[v[2]], [v[3]]]), examples * factor)
            for number, (v, examples) in enumerate(clients)
        ]

    expected = aggregate(*updates(1)).tensors
    for order in itertools.permutations(updates(1)):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in aggregate(*order).tensors.items())
    for name, tensor in aggregate(*updates(4)).tensors.items():
        assert torch.equal(tensor, expected[name])


def test_a_single_client_is_the_identity() -> None:
    update = ClientUpdate(0, adapters([[0.1, 0.2]], [[0.3], [0.4]]), examples=7)
    assert all(torch.equal(t, update.adapters.tensors[n]) for n, t in aggregate(update).tensors.items())
