"""Messages count their bytes as Flower's records do, and a reply holds no more than it must."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedsplit.federation.messages import (
    ADAPTERS,
    CONTROL,
    Briefing,
    Evaluate,
    Introduce,
    Train,
    introduction,
    measured,
    serialised_bytes,
    trained,
)
from fedsplit.federation.records import to_arrays
from fedsplit.lowrank import LowRank
from fedsplit.scores import Score
from fedsplit.updates import Adapters, ClientUpdate, Layer, Task

START = Adapters({"l.lora_A.weight": torch.randn(2, 3), "l.lora_B.weight": torch.randn(4, 2)}, {"l": Layer(2.0, True)})
NAMES = set(START.tensors)
BRIEFING = Briefing(run="{}", trunk="t", incarnation="first", threads=1, store="/nowhere")


def flower_bytes(tensors: dict[str, Tensor]) -> int:
    """Returns the bytes that Flower sends for tensors."""
    return sum(len(array.data) for array in to_arrays(tensors).values())


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(()),
        torch.zeros(0),
        torch.zeros(3),
        torch.zeros(2, 3),
        torch.zeros(3, 0, 2),
        torch.zeros(1, 2, 3, 4),
        torch.zeros(100_000),
        torch.zeros((1,) * 30),  # a header of more than 128 bytes
        torch.zeros(2, 3, dtype=torch.float16),
        torch.zeros(2, 3, dtype=torch.float64),
        torch.zeros(5, dtype=torch.int64),
        torch.zeros(5, dtype=torch.uint8),
        torch.zeros(5, dtype=torch.bool),
        torch.zeros(64, 3).t(),  # columns first
        torch.zeros(8, 8)[::2, 1:],
        torch.zeros(2, requires_grad=True),
    ],
    ids=lambda tensor: f"{tuple(tensor.shape)} {tensor.dtype}",
)
def test_bytes_are_those_of_flowers_arrays(tensor: Tensor) -> None:
    assert serialised_bytes({"x": tensor}) == flower_bytes({"x": tensor.detach()})
    assert serialised_bytes({"x": tensor, "y": tensor}) == 2 * serialised_bytes({"x": tensor})
    assert serialised_bytes({}) == 0


def test_a_request_counts_all_its_tensors() -> None:
    """Half of the factors, half of the bytes; a control variate counts like adapters."""
    assert Introduce(BRIEFING, 0).nbytes == 0
    sent = flower_bytes(dict(START.tensors))
    assert Train(BRIEFING, 0, tensors=START.tensors).nbytes == sent
    assert Train(BRIEFING, 0, tensors=START.tensors, task=Task(control=START.tensors)).nbytes == 2 * sent
    change = LowRank(torch.randn(4, 2), torch.randn(2, 3))
    evaluate = Evaluate(BRIEFING, 0, tensors=START.tensors, changes={"l": change})
    factors = flower_bytes({"up": change.up, "down": change.down})
    assert evaluate.change_bytes == factors
    assert evaluate.nbytes == sent + factors


def test_only_what_is_returned_goes_up() -> None:
    changed = START.with_tensors({name: tensor + 1 for name, tensor in START.tensors.items()})
    control = {name: 2 * tensor for name, tensor in START.tensors.items()}
    update = ClientUpdate(3, changed, examples=40, tokens=5120, loss=3.25, control=control, router_loss=0.5)
    reply = trained(update, {"l.lora_B.weight"}, Score(2.5, 3), peak_memory=7)
    assert {group: list(tensors) for group, tensors in reply.tensors.items()} == {
        ADAPTERS: ["l.lora_B.weight"],
        CONTROL: ["l.lora_B.weight"],
    }
    assert reply.nbytes == 2 * flower_bytes({"x": START.tensors["l.lora_B.weight"]})
    assert reply.client == 3
    assert reply.metrics == {
        "client": 3,
        "num-examples": 40,
        "tokens": 5120,
        "loss": 3.25,
        "sample-nats": 2.5,
        "sample-tokens": 3,
        "peak-memory": 7,
        "seconds": 0.0,
        "sample-seconds": 0.0,
        "router-loss": 0.5,
    }


def test_without_control_variate_and_experts_there_is_no_word_of_them() -> None:
    reply = trained(ClientUpdate(0, START, 1), NAMES, Score(), 0)
    assert set(reply.tensors) == {ADAPTERS}
    assert "router-loss" not in reply.metrics


def test_a_measurement_holds_numbers_only() -> None:
    reply = measured(2, Score(12.5, 5, 4), Score(4.5, 2), peak_memory=7)
    assert reply.tensors == {} and reply.nbytes == 0
    assert reply.metrics == {
        "client": 2,
        "num-examples": 5,
        "loss": 2.5,
        "nats": 12.5,
        "right": 4,
        "sample-nats": 4.5,
        "sample-tokens": 2,
        "peak-memory": 7,
        "seconds": 0.0,
    }


def test_the_first_introduction_holds_what_training_starts_from() -> None:
    reply = introduction(0, "about", {"top": START})
    assert set(reply.tensors) == {"top"} and reply.nbytes == serialised_bytes(START.tensors)
    assert introduction(1, "about", {}).nbytes == 0
