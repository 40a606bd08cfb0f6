"""The link is an ordinary function with an ordinary gradient."""

from __future__ import annotations

import torch

from fedsplit.link import Link
from fedsplit.updates import Packet, StepKey
from fedsplit.wire import make_codec

CODEC = make_codec("raw")
KEY = StepKey(1, 2, 3)


class Doubler:
    """A trunk that doubles; remembers what it was sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Packet]] = []

    def forward(self, packet: Packet) -> Packet:
        self.sent.append(("forward", packet))
        return Packet(packet.key, {"hidden": CODEC.encode(CODEC.decode(packet.tensors["hidden"]) * 2)})

    def backward(self, packet: Packet) -> Packet:
        self.sent.append(("backward", packet))
        gradient = CODEC.decode(packet.tensors["gradient"]) * 2
        wanted = self.sent[0][1].wants_gradient
        return Packet(packet.key, {"gradient": CODEC.encode(gradient)} if wanted else {})


def run(schedule: str, needs_gradient: bool) -> tuple[Doubler, torch.Tensor, torch.Tensor]:
    trunk = Doubler()
    start = torch.randn(1, 2, 3, requires_grad=needs_gradient)
    output = Link(trunk, CODEC, schedule)(start * 1, KEY)
    top = torch.ones(3, requires_grad=True)
    (output * top).sum().backward()
    return trunk, start, output


def test_the_gradient_crosses_and_comes_back() -> None:
    trunk, start, output = run("shared", True)
    assert torch.equal(output, start * 2)
    assert torch.equal(start.grad, torch.full_like(start, 2.0))
    assert [what for what, _ in trunk.sent] == ["forward", "backward"]
    assert {packet.key for _, packet in trunk.sent} == {KEY}


def test_forward_only_sends_no_gradient() -> None:
    trunk, start, _ = run("forward-only", True)
    assert start.grad is None
    assert [what for what, _ in trunk.sent] == ["forward"]


def test_a_bottom_without_adapters_still_lets_the_trunk_learn() -> None:
    trunk, _, _ = run("shared", False)
    assert [what for what, _ in trunk.sent] == ["forward", "backward"]
    assert trunk.sent[0][1].wants_gradient is False
    assert [what for what, _ in run("frozen", False)[0].sent] == ["forward"]


def test_evaluation_is_said_to_be_evaluation() -> None:
    trunk = Doubler()
    with torch.no_grad():
        Link(trunk, CODEC, "shared")(torch.ones(1, 1, 1), KEY)
    assert trunk.sent[0][1].training is False


def test_a_mask_is_sent_only_where_there_is_padding() -> None:
    trunk = Doubler()
    link = Link(trunk, CODEC, "shared")
    mask = torch.tensor([[1, 1], [1, 0]])
    link(torch.ones(2, 2, 3), KEY, torch.ones(2, 2))
    link(torch.ones(2, 2, 3), KEY, mask)
    assert "mask" not in trunk.sent[0][1].tensors
    assert torch.equal(CODEC.decode(trunk.sent[1][1].tensors["mask"]), mask.bool())
