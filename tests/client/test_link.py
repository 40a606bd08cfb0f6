"""The client's way through the trunk: what is sent when, and whose gradient comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from fedsplit.client.link import Link
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.wire.codecs import make_codec
from fedsplit.wire.packets import Packet, StepKey

CODEC = make_codec("raw")
KEY = StepKey(1, 2, 3)


class Doubler:
    """A trunk that doubles; remembers what it was sent, and is busy for a while first."""

    def __init__(self, busy: int = 0) -> None:
        self.sent: list[Packet] = []
        self.left: list[int] = []
        self.busy = busy

    def send(self, packet: Packet) -> Callable[[], Packet]:
        self.sent.append(packet)
        if self.busy:
            self.busy -= 1
            return lambda: Packet(packet.key, wait=0.001)
        if not packet.tensors:
            return lambda: Packet(packet.key)
        ((name, tensor),) = ((name, t) for name, t in packet.tensors.items() if name != "mask")
        answer = {name: CODEC.encode(CODEC.decode(tensor) * 2)}
        if name == "gradient" and not packet.wants_gradient:
            answer = {}
        return lambda: Packet(packet.key, answer)

    def leave(self, client: int) -> None:
        self.left.append(client)

    @property
    def kinds(self) -> list[str]:
        return [next(iter(packet.tensors)) for packet in self.sent]


def run(schedule: str, needs_gradient: bool, busy: int = 0) -> tuple[Doubler, torch.Tensor, torch.Tensor]:
    trunk = Doubler(busy)
    start = torch.randn(1, 2, 3, requires_grad=needs_gradient)
    step = Link(trunk, CODEC, SCHEDULES[schedule], "this-run", "first", 4).send(start * 1, KEY)
    output = step.output()
    top = torch.ones(3, requires_grad=True)
    (output * top).sum().backward()
    step.send_back(output.grad)
    step.finish()
    return trunk, start, output


def test_the_gradient_crosses_and_comes_back() -> None:
    trunk, start, output = run("shared", True)
    assert torch.equal(output, start * 2)
    assert torch.equal(start.grad, torch.full_like(start, 2.0))
    assert trunk.kinds == ["hidden", "gradient"]
    assert {packet.key for packet in trunk.sent} == {replace(KEY, run="this-run", attempt=4)}
    assert {packet.incarnation for packet in trunk.sent} == {"first"}


def test_forward_only_sends_no_gradient() -> None:
    trunk, start, _ = run("forward-only", True)
    assert start.grad is None
    assert trunk.kinds == ["hidden"]


def test_a_bottom_without_adapters_still_lets_the_trunk_learn() -> None:
    trunk, _, _ = run("shared", False)
    assert trunk.kinds == ["hidden", "gradient"]
    assert trunk.sent[0].wants_gradient is False
    assert run("frozen", False)[0].kinds == ["hidden"]


def test_a_client_that_is_told_to_wait_asks_again_with_the_same() -> None:
    trunk, start, output = run("shared", True, busy=3)
    assert trunk.kinds == ["hidden"] * 4 + ["gradient"]
    assert torch.equal(output, start * 2)
    assert len({packet.key for packet in trunk.sent}) == 1


def test_a_trunk_with_a_budget_is_asked_before_anything_is_sent() -> None:
    trunk = Doubler(busy=2)
    start = torch.randn(1, 2, 3, requires_grad=True)
    output = Link(trunk, CODEC, SCHEDULES["shared"], asks=True).send(start * 1, KEY).output()
    assert [bool(packet.tensors) for packet in trunk.sent] == [False, False, False, True]
    assert [packet.shape for packet in trunk.sent[:3]] == [(1, 2, 3)] * 3
    assert torch.equal(output, start * 2)
    Link(trunk, CODEC, SCHEDULES["shared"], asks=True).evaluate(start, KEY)
    assert trunk.sent[-1].tensors


def test_evaluation_is_said_to_be_evaluation_and_keeps_no_graph() -> None:
    trunk = Doubler()
    output = Link(trunk, CODEC, SCHEDULES["shared"]).evaluate(torch.ones(1, 1, 1, requires_grad=True), KEY)
    assert trunk.sent[0].training is False
    assert not output.requires_grad


def test_a_mask_is_sent_only_where_there_is_padding() -> None:
    trunk = Doubler()
    link = Link(trunk, CODEC, SCHEDULES["shared"])
    mask = torch.tensor([[1, 1], [1, 0]])
    link.send(torch.ones(2, 2, 3), KEY, torch.ones(2, 2))
    link.send(torch.ones(2, 2, 3), KEY, mask)
    assert "mask" not in trunk.sent[0].tensors
    assert torch.equal(CODEC.decode(trunk.sent[1].tensors["mask"]), mask.bool())


def test_leaving_is_passed_on() -> None:
    trunk = Doubler()
    Link(trunk, CODEC, SCHEDULES["shared"]).leave(2)
    assert trunk.left == [2]


def test_the_end_of_a_session_is_told_without_tensors() -> None:
    trunk = Doubler()
    Link(trunk, CODEC, SCHEDULES["shared"], "this-run", "first").end(replace(KEY, session="s"))
    (packet,) = trunk.sent
    assert packet == Packet(replace(KEY, run="this-run", session="s"), {}, training=False, incarnation="first")
