"""Forwards: whose hidden states are served, who has to wait for memory, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_server import RAW, make_server, packet, unchanged, with_values

from fedsplit.model.split import load_parts
from fedsplit.settings.sections import TrunkSettings
from fedsplit.trunk.dispatch import Dispatcher
from fedsplit.trunk.memory import Budget
from fedsplit.wire.casting import Cast
from fedsplit.wire.codecs import Role
from fedsplit.wire.encoded import Encoded
from fedsplit.wire.packets import Packet, StepKey
from fedsplit.wire.steps import SpoiledStep, StaleStep, UnboundedStep


def test_who_finds_no_room_is_told_to_wait_and_loses_nothing(model_path: Path) -> None:
    resident = 0
    tight = Budget(10**6, resident=lambda: resident, release=lambda: None)
    tight.learn(tokens=1, graph=50_000, working=0)
    server = make_server(model_path, "shared", budget=tight)
    server.forward(packet(0, 0))
    resident = 600_000
    assert server.forward(packet(1, 0)).wait > 0
    assert len(server.steps) == 1
    assert server.backward(packet(0, 0, "gradient")).tensors
    resident = 0
    assert server.forward(packet(1, 0)).tensors
    assert server.end_round([]).waits == 1


def question(client: int) -> Packet:
    return Packet(StepKey(1, client, 0), shape=(2, 5, 32))


def test_room_that_was_asked_for_is_kept_free(model_path: Path) -> None:
    """Each packet counts three times while it is on its way, and there are two: hidden states and gradient."""
    tight = Budget(100_000, resident=lambda: 0, release=lambda: None)
    tight.learn(tokens=1, graph=8_000, working=0)  # a step of 10 tokens: 80,000; its packet: 1,280
    server = make_server(model_path, "shared", budget=tight)
    assert [server.ask(question(client)).wait > 0 for client in (0, 1, 2)] == [False, False, True]
    assert server.ask(question(0)).wait == 0  # asked again: it has its room
    assert server.forward(packet(0, 0)).tensors
    assert server.ask(question(2)).wait == 0
    server.leave(1)
    assert server.ask(question(3)).wait == 0
    assert server.traffic.activation.up == packet(0, 0).nbytes


def test_graphs_go_before_anybody_is_sent_away(model_path: Path) -> None:
    resident = 0
    tight = Budget(10**6, resident=lambda: resident, release=lambda: None)
    tight.learn(tokens=1, graph=20_000, working=0)
    server = make_server(model_path, "shared", budget=tight)
    server.forward(packet(0, 0))
    assert server.steps.pending()[0].output is not None
    resident = 900_000
    server.ask(question(1))
    assert server.steps.pending()[0].output is None
    assert server.backward(packet(0, 0, "gradient")).tensors
    assert server.end_round([]).recomputed == 1


def test_kept_answers_do_not_starve_those_who_wait(model_path: Path) -> None:
    """All have their answers and none goes on: the answers are given up, and who asks for one again is refused."""
    resident = 0
    tight = Budget(10**6, resident=lambda: resident, release=lambda: None)
    tight.learn(tokens=1, graph=20_000, working=0)
    server = make_server(model_path, "shared", budget=tight)
    server.forward(packet(0, 0))
    server.backward(packet(0, 0, "gradient"))
    resident = 900_000
    assert server.ask(question(1)).wait > 0
    with pytest.raises(StaleStep):
        server.backward(packet(0, 0, "gradient"))
    resident = 0
    assert server.ask(question(1)).wait == 0


def test_a_batch_that_finds_room_for_some_serves_those(model_path: Path) -> None:
    tight = Budget(10**6, resident=lambda: 0, release=lambda: None)
    tight.learn(tokens=1, graph=60_000, working=0)
    server = make_server(model_path, "batched", budget=tight)
    answers = server.forward_together([packet(client, 0) for client in range(3)])
    assert [answer.wait > 0 for answer in answers] == [False, True, True]


def test_who_finds_no_room_is_not_refused_for_what_another_one_spoilt(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only one that was served spoils it: the others, sent away, are still served as one."""
    server = make_server(tiny_models["gpt2"], "batched")
    room = server._state.admission.room
    rooms = [lambda inputs: ("graph", 1), room]
    monkeypatch.setattr(server._state.admission, "room", lambda inputs: rooms.pop(0)(inputs))
    monkeypatch.setattr("fedsplit.trunk.intake.is_bounded", lambda *tensors: True)
    trunk = Dispatcher(server, TrunkSettings(schedule="batched"))
    trunk.begin([0, 1, 2])
    found: dict[int, Any] = {}
    for client in range(3):
        sent = packet(client, 0) if client else with_values(packet(0, 0), 1e30)
        trunk.submit(sent, partial(found.__setitem__, client))
    while trunk.advance():
        pass
    assert isinstance(found[0], UnboundedStep) and all(found[client].tensors for client in (1, 2))
    assert server.counts.forwards == 1 and not rooms


def test_the_base_weights_answer_without_the_adapter_and_leave_no_trace(model_path: Path) -> None:
    server = make_server(model_path, "copies")
    tensors = {name: tensor + 0.1 for name, tensor in server.adapters.read().tensors.items()}
    server.adapters.write(tensors)
    asked = packet(0, 0, training=False)
    with torch.no_grad():
        (bare,) = load_parts(model_path, (1, 2), ["trunk"])
        expected = bare.eval()(RAW.decode(asked.tensors["hidden"]))
    found = RAW.decode(server.forward(replace(asked, is_adapted=False)).tensors["hidden"])
    assert torch.allclose(found, expected, atol=1e-6)
    tuned = RAW.decode(server.forward(asked).tensors["hidden"])
    assert not torch.allclose(tuned, expected, atol=1e-3)
    assert unchanged(server, tensors) and len(server.steps) == 0 and not server.adapters.copies()
    crossed = asked.tensors["hidden"].nbytes
    assert server.traffic.document() == dict.fromkeys(
        ("evaluation_activation_up", "evaluation_activation_down", "reference_up", "reference_down"), crossed
    )


def test_base_weights_do_not_train(model_path: Path) -> None:
    server = make_server(model_path, "shared")
    with pytest.raises(SpoiledStep, match="trains, and asks for the base weights alone"):
        server.forward(replace(packet(0, 0), is_adapted=False))
    assert len(server.steps) == 0


@pytest.mark.parametrize("shape", [(2, 5, 31), (5, 32), (0, 5, 32)])
def test_hidden_states_of_a_wrong_shape_are_refused(model_path: Path, shape: tuple[int, ...]) -> None:
    server = make_server(model_path, "shared")
    with pytest.raises(SpoiledStep, match="sent hidden states of shape"):
        server.forward(Packet(StepKey(1, 0, 0), {"hidden": RAW.encode(torch.zeros(shape))}))
    assert len(server.steps) == 0


@pytest.mark.parametrize("training", [True, False])
def test_a_mask_of_another_shape_is_refused(model_path: Path, training: bool) -> None:
    server = make_server(model_path, "shared")
    tensors = {**packet(0, 0).tensors, "mask": RAW.encode(torch.ones(2, 4, dtype=torch.bool))}
    with pytest.raises(SpoiledStep, match=r"sent a mask of shape \(2, 4\), not \(2, 5\)"):
        server.forward(Packet(StepKey(1, 0, 0), tensors, training))
    assert len(server.steps) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("training", [True, False])
def test_hidden_states_that_cannot_be_computed_with_are_refused(model_path: Path, value: float, training: bool) -> None:
    server = make_server(model_path, "shared")
    before = server.adapters.read().tensors
    with pytest.raises(SpoiledStep, match=r"client 0, step 0.* sent hidden states that are NaN, infinite or too large"):
        server.forward(with_values(packet(0, 0, training=training), value))
    assert unchanged(server, before) and len(server.steps) == 0


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("hidden", torch.zeros(2, 5, 32, dtype=torch.int64), "an array of torch.int64"),
        ("hidden", torch.zeros(2, 5, 32, dtype=torch.float64), "of type torch.float64, not torch.float32"),
        ("hidden", torch.zeros(1, 999, 32), "sent 999 positions, beyond the model's"),
        ("mask", torch.full((2, 5), math.nan), "a mask of type torch.float32"),
    ],
    ids=["integers", "float64", "too long", "mask"],
)
def test_tensors_of_other_types_are_not_cast(
    tiny_models: dict[str, Path], name: str, tensor: torch.Tensor, words: str
) -> None:
    server = make_server(tiny_models["gpt2"], "shared")
    encoded = RAW.encode(tensor)
    if tensor.dtype == torch.int64:
        encoded = replace(encoded, header={"dtype": "float32"})
    with pytest.raises(SpoiledStep, match=words):
        server.forward(replace(packet(0, 0), tensors={**packet(0, 0).tensors, name: encoded}))


def test_room_is_promised_for_shapes_alone(tiny_models: dict[str, Path]) -> None:
    """Of a negative size there would be room for everything."""
    server = make_server(tiny_models["gpt2"], "shared", budget=Budget(10**12))
    for shape in ((), (2, 5), (2, 5, 31), (0, 5, 32)):
        with pytest.raises(SpoiledStep, match="sent hidden states of shape"):
            server.ask(Packet(StepKey(1, 0, 0), shape=shape))


def test_a_codec_does_not_see_what_is_refused_as_stale(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its state belongs to the client's newest step."""
    server = make_server(tiny_models["gpt2"], "shared")
    server.forward(packet(0, 1))
    decode, seen = Cast.decode, []

    def watched(self: Cast, encoded: Encoded, role: Role | None = None) -> torch.Tensor:
        seen.append(role)
        return decode(self, encoded, role)

    monkeypatch.setattr(Cast, "decode", watched)
    with pytest.raises(StaleStep):
        server.forward(packet(0, 0))
    assert seen == []
    server.forward(packet(0, 2))
    assert [(role.kind, role.direction, role.key.step) for role in seen] == [("activation", "up", 2)]
