"""The client's view of the trunk: an ordinary function of hidden states, with an ordinary gradient."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedsplit.schedules import SCHEDULES
from fedsplit.updates import Packet, StepKey
from fedsplit.wire import Codec


class TrunkLike(Protocol):
    """Whatever answers a client's packets: a `TrunkServer` itself, or a handle on one elsewhere."""

    def forward(self, packet: Packet) -> Packet:
        """Hidden states up, hidden states down."""
        ...

    def backward(self, packet: Packet) -> Packet:
        """Gradient up, gradient down."""
        ...


class Link:
    """Calls the trunk across the wire.

    `link(hidden, key)` returns the trunk's hidden states; a later `backward()` sends the gradient over the
    same road and hands what comes back to the bottom.
    """

    def __init__(self, trunk: TrunkLike, codec: Codec, schedule: str) -> None:
        """Ties the client's side to a trunk.

        Args:
            trunk: Who answers.
            codec: How tensors are encoded, the same as the trunk's.
            schedule: The trunk's schedule; decides whether gradients are sent.
        """
        self._trunk, self._codec = trunk, codec
        self._schedule = SCHEDULES[schedule]

    def __call__(self, hidden: Tensor, key: StepKey, mask: Tensor | None = None) -> Tensor:
        """Sends hidden states (B, T, D) through the trunk.

        Args:
            hidden: The bottom's output.
            key: The step this belongs to.
            mask: (B, T), 0 on padding; sent only where there is padding.

        Returns:
            The trunk's output (B, T, D). It carries a gradient where the schedule and the caller want one.
        """
        training = torch.is_grad_enabled()
        wants_gradient = training and hidden.requires_grad
        if not (training and self._schedule.expects_backward(wants_gradient)):
            return self._forward(hidden, key, mask, training, wants_gradient)
        if not wants_gradient:  # the bottom has no adapter; autograd must still call the trunk, which has one
            hidden = hidden.detach().requires_grad_()
        output: Tensor = _Crossing.apply(hidden, self, key, mask, wants_gradient)  # type: ignore[no-untyped-call]
        return output

    def _forward(self, hidden: Tensor, key: StepKey, mask: Tensor | None, training: bool, wants: bool) -> Tensor:
        tensors = {"hidden": self._codec.encode(hidden)}
        if mask is not None and not bool(mask.all()):
            tensors["mask"] = self._codec.encode(mask.bool())
        answer = self._trunk.forward(Packet(key, tensors, training, wants))
        return self._codec.decode(answer.tensors["hidden"])

    def _backward(self, gradient: Tensor, key: StepKey) -> Tensor | None:
        answer = self._trunk.backward(Packet(key, {"gradient": self._codec.encode(gradient)}))
        return self._codec.decode(answer.tensors["gradient"]) if answer.tensors else None


class _Crossing(torch.autograd.Function):
    """Forward and backward across the wire, as one node of the client's graph."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, link: Link, key: StepKey, mask: Tensor | None, wants: bool) -> Tensor:
        ctx.link, ctx.key = link, key
        return link._forward(hidden, key, mask, True, wants)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        return ctx.link._backward(gradients[0], ctx.key), None, None, None, None
