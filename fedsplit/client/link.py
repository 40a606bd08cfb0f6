"""A client's view of the trunk: hidden states go up and come back down, and gradients take the same road.

Shapes: B sequences of T tokens, D the width of hidden states.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from fedsplit.model.routers import SUMS, RouterSums
from fedsplit.trunk.schedules import Schedule
from fedsplit.wire.casting import EXACT
from fedsplit.wire.codecs import Codec, Role
from fedsplit.wire.packets import Packet, StepKey
from fedsplit.wire.scaling import backward
from fedsplit.wire.transport import PendingAnswer


class TrunkLike(Protocol):
    """The part of `fedsplit.trunk.port.TrunkPort` that a client's link needs."""

    def send(self, packet: Packet) -> PendingAnswer:
        """Sends a packet; the function that is returned waits for the answer."""
        ...

    def leave(self, client: int) -> None:
        """Tells the trunk that a client's round is over."""
        ...


class PendingStep:
    """One micro-batch on its way through the trunk and back.

    Call `output`, then `send_back` with the gradient of the loss by it, then `finish`. Between these calls the client
    may do other work, while the trunk works on this micro-batch.

    Attributes:
        sums: Router sums behind the trunk, once `output` has returned; they require a gradient as the output does.
            None where none were sent.
        norm: With clipping, squared norm of the step's gradient by the trunk's adapter, once the last part of the step
            has finished; None where the trunk does not learn. The trunk then waits for `scale`.
    """

    def __init__(self, link: Link, packet: Packet, hidden: Tensor, sums: RouterSums | None = None) -> None:
        """Sends the hidden states.

        Args:
            link: Link to the trunk.
            packet: Packet with the hidden states.
            hidden: Output of the bottom (B, T, D), with its graph.
            sums: Sums of the bottom's routers, with their graph.
        """
        self._link = link
        self._packet = packet
        self._hidden = hidden
        self._bottom_sums = sums
        self.sums: RouterSums | None = None
        self.norm: float | None = None
        self._returns = packet.training and link.schedule.expects_backward(packet.wants_gradient)
        self._asks = link.asks and self._returns
        admission = replace(packet, tensors={}, shape=tuple(hidden.shape))
        self._first = admission if self._asks else packet
        self._answer = link.trunk.send(self._first)

    def output(self) -> Tensor:
        """Waits for the trunk's output (B, T, D): a leaf that requires a gradient where the trunk expects one.

        A trunk that has no memory now is asked again, as often as it takes.
        """
        answer = self._settled()
        if self._asks:
            self._first = self._packet
            self._answer = self._link.trunk.send(self._packet)
            answer = self._settled()
        if self._bottom_sums is not None:
            sums = RouterSums.unpacked(EXACT.decode(answer.tensors[SUMS]).to(self._hidden.device))
            self.sums = sums.as_leaf(self._returns)
        hidden = self._link.codec.decode(answer.tensors["hidden"], self._role("activation", "down"))
        return hidden.to(self._hidden.device).requires_grad_(self._returns)

    def _role(self, kind: Literal["activation", "gradient"], direction: Literal["up", "down"]) -> Role:
        return Role(kind, direction, self._packet.key, self._packet.training, self._hidden.dtype)

    def _settled(self) -> Packet:
        """Waits for an answer that does not ask to wait."""
        answer = self._answer()
        while answer.wait:
            time.sleep(answer.wait)
            answer = self._link.trunk.send(self._first)()
        return answer

    def send_back(self, gradient: Tensor | None) -> None:
        """Sends the gradient of the loss by the output (B, T, D) and by the router sums, where the trunk expects it."""
        if self._returns and gradient is not None:
            tensors = {"gradient": self._link.codec.encode(gradient, self._role("gradient", "up"))}
            if self.sums is not None and self.sums.probabilities.grad is not None:
                tensors[SUMS] = EXACT.encode(self.sums.probabilities.grad)
            self._answer = self._link.trunk.send(replace(self._packet, tensors=tensors))

    def finish(self, below: Iterable[Tensor] = ()) -> None:
        """Waits for the gradient of the bottom's output, and backpropagates it through the bottom.

        Args:
            below: Parameters of the bottom; used in float16 alone, where their gradients are scaled back.
        """
        if not self._returns:
            return
        answer = self._answer()
        if "gradient" in answer.tensors:
            encoded = answer.tensors["gradient"]
            gradient = self._link.codec.decode(encoded, self._role("gradient", "down")).to(self._hidden.device)
            if self._bottom_sums is not None and self._bottom_sums.probabilities.requires_grad:
                assert self.sums is not None and self.sums.probabilities.grad is not None
                # Sums only grow on their way, so the gradient of the loss by them is the same here as at the top.
                both = [self._hidden, self._bottom_sums.probabilities]
                torch.autograd.backward(both, [gradient, self.sums.probabilities.grad])
            else:
                backward(self._hidden, below, start=gradient)
        if "norm" in answer.tensors:
            self.norm = float(EXACT.decode(answer.tensors["norm"]))

    def scale(self, coefficient: float) -> None:
        """Sends the clipping coefficient of the whole step, and waits until the trunk has used it."""
        value = EXACT.encode(torch.tensor(coefficient, dtype=torch.float64))
        packet = replace(self._packet, key=self._packet.clipping_key, tensors={"coefficient": value})
        self._link.trunk.send(packet)()


@dataclass(frozen=True)
class Link:
    """A client's link to the trunk.

    Attributes:
        trunk: The trunk, by whatever door.
        codec: Codec of hidden states and gradients, a new one of the kind that the trunk uses.
        schedule: Schedule of the trunk, which decides whether gradients are sent.
        run: Name of the run, which steps carry.
        incarnation: Id of the trunk's life, which packets carry.
        attempt: How often this round was begun before.
        asks: True if the trunk has a memory budget, and must be asked before hidden states are sent.

    Example:
        >>> from fedsplit.trunk.schedules import SCHEDULES
        >>> from fedsplit.wire.codecs import make_codec
        >>> class Echo:  # a trunk without blocks
        ...     def send(self, packet):
        ...         return lambda: packet
        ...     def leave(self, client):
        ...         pass
        >>> link = Link(Echo(), make_codec("raw"), SCHEDULES["shared"])
        >>> step = link.send(torch.ones(1, 2, 3), StepKey(round=1, client=0, step=0))
        >>> step.output().shape
        torch.Size([1, 2, 3])
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
    ) -> PendingStep:
        """Sends hidden states (B, T, D) to the trunk, and does not wait.

        Args:
            hidden: Output of the bottom.
            key: Step, with batch and micro-batch.
            mask: Mask (B, T), 0 on padding; sent only where there is padding.
            micros: Number of micro-batches in the batch.
            training: True for a training step, with dropout and a way back; False for evaluation.
            batches: Number of batches in the step.
            rate: Share of the learning rate at which the step is made.
            sums: Sums of the bottom's routers, where there is an auxiliary loss.
            learns: False where the client wants a gradient, and the trunk's adapter must not learn from the step.
        """
        key = replace(key, run=self.run, attempt=self.attempt)
        role = Role("activation", "up", key, training, hidden.dtype)
        tensors = {"hidden": self.codec.encode(hidden, role)}
        if sums is not None:
            tensors[SUMS] = EXACT.encode(sums.packed())
        if mask is not None and not bool(mask.all()):
            tensors["mask"] = EXACT.encode(mask.bool())
        packet = Packet(
            key,
            tensors,
            training,
            wants_gradient=training and hidden.requires_grad,
            micros=micros,
            incarnation=self.incarnation,
            batches=batches,
            rate=rate,
            learns=learns,
        )
        return PendingStep(self, packet, hidden, sums)

    @torch.no_grad()
    def evaluate(self, hidden: Tensor, key: StepKey, mask: Tensor | None = None) -> Tensor:
        """Sends hidden states (B, T, D) through the trunk without dropout, and waits for its output."""
        return self.send(hidden, key, mask, training=False).output()

    def end(self, key: StepKey) -> None:
        """Ends a decoding session, which the trunk then frees."""
        self.trunk.send(Packet(replace(key, run=self.run), training=False, incarnation=self.incarnation))()

    def leave(self, client: int) -> None:
        """Tells the trunk that a client's round is over."""
        self.trunk.leave(client)
