"""The server half of a step: exact gradients, versions, schedules, counted bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import without_dropout

from fedsplit import adapters
from fedsplit.config import LoraSettings, TrainSettings
from fedsplit.schedules import SCHEDULES
from fedsplit.split import load_parts
from fedsplit.steps import UnknownStep
from fedsplit.trunk import TrunkServer
from fedsplit.updates import Packet, StepKey
from fedsplit.wire import make_codec

RAW = make_codec("raw")


def make_server(path: Path, schedule: str, dropout: float = 0.0, cut: tuple[int, int] = (1, 2)) -> TrunkServer:
    (part,) = load_parts(path, cut, ["trunk"])
    adapters.add(part, LoraSettings(rank=2, dropout=dropout), seed=0)
    without_dropout(part)
    for number, parameter in enumerate(adapters.parameters(part).values()):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.2
    return TrunkServer(part, RAW, schedule, TrainSettings(lr=0.01), seed=5)


def packet(client: int, step: int, what: str = "hidden", training: bool = True, wants: bool = True) -> Packet:
    generator = torch.Generator().manual_seed(100 * client + step + (what == "hidden"))
    tensor = torch.randn(2, 5, 32, generator=generator)
    return Packet(StepKey(1, client, step), {what: RAW.encode(tensor)}, training, wants)


def test_the_gradient_is_the_parts_own_not_the_one_sent(model_path: Path) -> None:
    """The classic mistake is to return the incoming gradient unchanged: its cosine to the true one is near 1."""
    server = make_server(model_path, "shared")
    (part,) = load_parts(model_path, (1, 2), ["trunk"])
    adapters.add(part, LoraSettings(rank=2, dropout=0.0), seed=0)
    without_dropout(part)
    adapters.write(server.read().tensors, part)
    hidden = RAW.decode(packet(0, 0).tensors["hidden"]).requires_grad_()
    expected = part(hidden)
    sent = RAW.decode(packet(0, 0, "gradient").tensors["gradient"])
    expected.backward(sent)
    answer = server.forward(packet(0, 0))
    assert torch.equal(RAW.decode(answer.tensors["hidden"]), expected)
    returned = RAW.decode(server.backward(packet(0, 0, "gradient")).tensors["gradient"])
    assert torch.equal(returned, hidden.grad)
    assert not torch.allclose(returned, sent)


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_only_shared_changes_the_adapter(model_path: Path, schedule: str) -> None:
    server = make_server(model_path, schedule)
    before = server.read().tensors
    server.forward(packet(0, 0))
    if SCHEDULES[schedule].returns_gradient:
        assert server.backward(packet(0, 0, "gradient")).tensors
    else:
        with pytest.raises(UnknownStep):
            server.backward(packet(0, 0, "gradient"))
    after = server.read().tensors
    for name in before:
        assert torch.equal(before[name], after[name]) == (schedule != "shared"), name


def test_a_step_of_another_client_does_not_touch_a_pending_gradient(model_path: Path) -> None:
    """Client 0's gradient is for the weights its activations came from, whatever client 1 did meanwhile."""
    alone, shared = (make_server(model_path, "shared", dropout=0.2) for _ in range(2))
    alone.forward(packet(0, 0))
    expected = RAW.decode(alone.backward(packet(0, 0, "gradient")).tensors["gradient"])
    shared.forward(packet(0, 0))
    shared.forward(packet(1, 0))
    shared.backward(packet(1, 0, "gradient"))
    actual = RAW.decode(shared.backward(packet(0, 0, "gradient")).tensors["gradient"])
    assert torch.equal(actual, expected)


def test_dropout_depends_on_the_key_alone(model_path: Path) -> None:
    server = make_server(model_path, "frozen", dropout=0.5)
    torch.manual_seed(1)
    first = RAW.decode(server.forward(packet(0, 0)).tensors["hidden"])
    state = torch.get_rng_state()
    server.forward(packet(1, 0))
    again = RAW.decode(server.forward(packet(0, 0)).tensors["hidden"])
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)
    other = Packet(StepKey(1, 0, 1), packet(0, 0).tensors)
    assert not torch.equal(RAW.decode(server.forward(other).tensors["hidden"]), first)


def test_evaluation_has_no_dropout_and_keeps_nothing(model_path: Path) -> None:
    server = make_server(model_path, "shared", dropout=0.5)
    outputs = [RAW.decode(server.forward(packet(0, 0, training=False)).tensors["hidden"]) for _ in range(2)]
    assert torch.equal(*outputs)
    assert len(server.steps) == 0


def test_forwards_without_backward_are_counted_and_freed(model_path: Path) -> None:
    server = make_server(model_path, "shared")
    for step in range(3):
        server.forward(packet(0, step))
    assert server.forget_pending() == 3
    with pytest.raises(UnknownStep, match=r"client=0, step=1"):
        server.backward(packet(0, 1, "gradient"))


def test_bytes_are_those_of_the_tensors(model_path: Path) -> None:
    server = make_server(model_path, "shared")
    server.forward(packet(0, 0))
    server.backward(packet(0, 0, "gradient"))
    server.forward(packet(0, 1, training=False))
    size = 2 * 5 * 32 * 4
    assert server.traffic == {
        "activation_up": size,
        "activation_down": size,
        "gradient_up": size,
        "gradient_down": size,
        "evaluation_activation_up": size,
        "evaluation_activation_down": size,
    }


def test_no_gradient_is_sent_to_a_bottom_that_cannot_use_it(model_path: Path) -> None:
    server = make_server(model_path, "shared")
    before = server.read().tensors
    server.forward(packet(0, 0, wants=False))
    assert server.backward(packet(0, 0, "gradient")).nbytes == 0
    assert any(not torch.equal(before[name], tensor) for name, tensor in server.read().tensors.items())


def test_parameters_are_counted_as_trained_only_where_they_are(model_path: Path) -> None:
    shared, frozen = make_server(model_path, "shared").count(), make_server(model_path, "frozen").count()
    assert shared["total"] == frozen["total"]
    assert shared["trainable"] > 0
    assert frozen["trainable"] == 0
