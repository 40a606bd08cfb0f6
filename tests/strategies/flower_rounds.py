"""Rounds for server optimisers: two worked by hand, and the same ones for Flower's own strategies, as messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from rounds import Round, start
from torch import Tensor

from fedsplit.updates import Adapters, ClientUpdate, Layer

A = "l.lora_A.weight"


def single(value: float) -> Adapters:
    return Adapters({A: torch.tensor([[value]]), "l.lora_B.weight": torch.zeros(1, 1)}, {"l": Layer(3.0, False)})


def two_rounds(strategy: Any) -> list[float]:
    """From A = 0, clients of 1 and 3 examples return 4 and 8 in both rounds."""
    state, adapters, seen = strategy.init(single(0.0)), single(0.0), []
    for _ in range(2):
        updates = [ClientUpdate(0, single(4.0), 1), ClientUpdate(1, single(8.0), 3)]
        state, adapters = strategy.aggregate(state, adapters, updates)
        seen.append(adapters.tensors[A].item())
        assert adapters.tensors["l.lora_B.weight"].item() == 0.0
    return seen


def arrays(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    return ArrayRecord({name: Array(tensor.numpy().copy()) for name, tensor in sorted(tensors.items())})


def flower_round(strategy: Any, number: int, adapters: Adapters, updates: Sequence[ClientUpdate]) -> dict[str, Tensor]:
    """What Flower's strategy makes of a round; the first has the number 1."""
    strategy.configure_train(number, arrays(adapters.tensors), ConfigRecord(), None)
    replies = []
    for update in updates:
        content = RecordDict(
            {"a": arrays(update.adapters.tensors), "m": MetricRecord({"num-examples": update.examples})}
        )
        replies.append(Message(content, dst_node_id=1, message_type="train"))
    result, _ = strategy.aggregate_train(number, replies)
    return {name: torch.from_numpy(array.numpy()).float() for name, array in result.items()}


def assert_equal_rounds(ours: Any, theirs: Any, clients: int, seed: int, rounds: int = 5) -> None:
    """Several rounds of random clients give equal numbers; `theirs` was made with fraction_train = 0."""
    run, flower = Round.begin(ours, start(seed=seed)), start(seed=seed)
    for number in range(rounds):
        updates = run.train([2] * clients, seed=seed)
        expected = flower_round(theirs, number + 1, flower, updates)
        got = run.aggregate(updates).tensors
        assert got.keys() == expected.keys()
        for name, tensor in got.items():
            torch.testing.assert_close(tensor, expected[name], rtol=2e-5, atol=2e-6)
        assert any(not torch.equal(tensor, flower.tensors[name]) for name, tensor in got.items())
        flower = flower.with_tensors(expected)
