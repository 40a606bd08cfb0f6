"""The client's view of the trunk: hidden states across the wire, and gradients back over the same road."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fedsplit.model.routers import SUMS, RouterSums
from fedsplit.trunk.schedules import Schedule
from fedsplit.wire.codecs import EXACT, Codec
from fedsplit.wire.packets import Packet, StepKey
from fedsplit.wire.scaling import backward

Answer = Callable[[], Packet]
"""Waits for an answer and returns it."""


class TrunkLike(Protocol):
    """Whatever takes a client's packets: a trunk in this process, or a handle on one elsewhere."""

    def send(self, packet: Packet) -> Answer:
        """Hidden states or a gradient up; what is returned waits for those that come down."""
        ...

    def leave(self, client: int) -> None:
        """The client's round is over."""
        ...


class Crossing:
    """One micro-batch on its way through the trunk and back.

    In order: `output`, then `send_back` with the gradient of the loss by it, then `finish`. Between them the
    client may do other work; the trunk does this one's meanwhile.

    Attributes:
        sums: The routers' sums behind the trunk, once there is an output; they take a gradient as it does. None where
            none were sent.
        norm: With clipping, the squared norm of the step's gradient by the trunk's adapter: of the last part of a step,
            once it has finished, where the trunk learns. The trunk then waits for `scale`.
    """

    def __init__(self, link: Link, packet: Packet, hidden: Tensor, sums: RouterSums | None = None) -> None:
        """Sends the hidden states.

        Args:
            link: The way.
            packet: What goes up.
            hidden: The bottom's output (B, T, D), with its graph.
            sums: Of the bottom's routers, with their graph.
        """
        self._link, self._packet, self._hidden, self._bottom_sums = link, packet, hidden, sums
        self.sums: RouterSums | None = None
        self.norm: float | None = None
        self._returns = packet.training and link.schedule.expects_backward(packet.wants_gradient)
        self._asks = link.asks and self._returns
        question = replace(packet, tensors={}, shape=tuple(hidden.shape))
        self._first = question if self._asks else packet
        self._answer = link.trunk.send(self._first)

    def output(self) -> Tensor:
        """Waits for the trunk's output (B, T, D): a leaf that takes a gradient where the trunk wants one.

        A trunk that has no room now is asked again, as often as it takes.
        """
        answer = self._settled()
        if self._asks:
            self._first, self._answer = self._packet, self._link.trunk.send(self._packet)
            answer = self._settled()
        if self._bottom_sums is not None:
            self.sums = RouterSums.unpacked(EXACT.decode(answer.tensors[SUMS]).to(self._hidden.device))
            self.sums = self.sums.as_leaf(self._returns)
        hidden = self._link.codec.decode(answer.tensors["hidden"]).to(self._hidden.device)
        return hidden.requires_grad_(self._returns)

    def _settled(self) -> Packet:
        """The answer, once it is not to wait."""
        answer = self._answer()
        while answer.wait:
            time.sleep(answer.wait)
            answer = self._link.trunk.send(self._first)()
        return answer

    def send_back(self, gradient: Tensor | None) -> None:
        """Sends the gradient (B, T, D) of the loss by the output, where the trunk wants one; that by the sums too."""
        if self._returns and gradient is not None:
            tensors = {"gradient": self._link.codec.encode_gradient(gradient, self._hidden.dtype)}
            if self.sums is not None and self.sums.probabilities.grad is not None:
                tensors[SUMS] = EXACT.encode(self.sums.probabilities.grad)
            self._answer = self._link.trunk.send(replace(self._packet, tensors=tensors))

    def finish(self, below: Iterable[Tensor] = ()) -> None:
        """Waits for the gradient of the bottom's output, and goes on with it through the bottom.

        Args:
            below: The bottom's parameters; asked for in float16 alone, where their gradients are scaled back.
        """
        if not self._returns:
            return
        answer = self._answer()
        if "gradient" in answer.tensors:
            gradient = self._link.codec.decode(answer.tensors["gradient"]).to(self._hidden.device)
            if self._bottom_sums is not None and self._bottom_sums.probabilities.requires_grad:
                assert self.sums is not None and self.sums.probabilities.grad is not None
                # The sums only grow on their way: what the loss gains by them is the same here as at the top.
                both = [self._hidden, self._bottom_sums.probabilities]
                torch.autograd.backward(both, [gradient, self.sums.probabilities.grad])
            else:
                backward(self._hidden, below, start=gradient)
        if "norm" in answer.tensors:
            self.norm = float(EXACT.decode(answer.tensors["norm"]))

    def scale(self, coefficient: float) -> None:
        """Tells the trunk what its gradient of the whole step is to be scaled by, and waits until it counts."""
        value = EXACT.encode(torch.tensor(coefficient, dtype=torch.float64))
        packet = replace(self._packet, key=self._packet.clipping_key, tensors={"coefficient": value})
        self._link.trunk.send(packet)()


@dataclass(frozen=True)
class Link:
    """The way through the trunk.

    Attributes:
        trunk: Who answers.
        codec: How tensors are encoded, the same as the trunk's.
        schedule: The trunk's; decides whether gradients are sent.
        run: The run's name, which steps carry.
        incarnation: The trunk's life that steps are meant for.
        attempt: How often this round was begun before.
        asks: Whether the trunk has a budget and must be asked for room before anything is sent.
    """

    trunk: TrunkLike
    codec: Codec
    schedule: Schedule
    run: str = ""
    incarnation: str = ""
    attempt: int = 0
    asks: bool = False

    def send(
        self,
        hidden: Tensor,
        key: StepKey,
        mask: Tensor | None = None,
        micros: int = 1,
        training: bool = True,
        batches: int = 1,
        rate: float = 1.0,
        sums: RouterSums | None = None,
        learns: bool = True,
    ) -> Crossing:
        """Sends hidden states (B, T, D) on their way, and does not wait.

        Args:
            hidden: The bottom's output.
            key: The step, and the batch and micro-batch within it.
            mask: (B, T), 0 on padding; sent only where there is padding.
            micros: Micro-batches of the batch.
            training: Whether a gradient may come back, and dropout is on.
            batches: Batches of the step.
            rate: The share of the learning rate at which the step is made.
            sums: Of the bottom's routers, where there is an auxiliary loss.
            learns: Whether the trunk learns from the step.
        """
        tensors = {"hidden": self.codec.encode(hidden)}
        if sums is not None:
            tensors[SUMS] = EXACT.encode(sums.packed())
        if mask is not None and not bool(mask.all()):
            tensors["mask"] = self.codec.encode(mask.bool())
        key = replace(key, run=self.run, attempt=self.attempt)
        wants = training and hidden.requires_grad
        how: dict[str, Any] = {"batches": batches, "rate": rate, "learns": learns}
        packet = Packet(key, tensors, training, wants, micros, self.incarnation, **how)
        return Crossing(self, packet, hidden, sums)

    @torch.no_grad()
    def evaluate(self, hidden: Tensor, key: StepKey, mask: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, D) through the trunk, without dropout and without a way back."""
        return self.send(hidden, key, mask, training=False).output()

    def end(self, key: StepKey) -> None:
        """Tells the trunk that a session is over: nothing need be remembered of it any more."""
        self.trunk.send(Packet(replace(key, run=self.run), training=False, incarnation=self.incarnation))()

    def leave(self, client: int) -> None:
        """Tells the trunk that a client's round is over."""
        self.trunk.leave(client)
