"""A client's view of the trunk: hidden states go up and come back down, and so do gradients.

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
from fedsplit.wire.encoded import Encoded
from fedsplit.wire.example_numbers import encoded_examples
from fedsplit.wire.packets import EXAMPLES, Packet, StepKey
from fedsplit.wire.scaling import backward
from fedsplit.wire.transport import PendingAnswer


class TrunkLike(Protocol):
    """Part of `fedsplit.trunk.port.TrunkPort` for a client's link."""

    def send(self, packet: Packet) -> PendingAnswer:
        """Sends a packet, and returns a function that waits for the answer."""
        ...

    def leave(self, client: int) -> None:
        """Tells the trunk that a client's round is over."""
        ...


class PendingStep:
    """One micro-batch on its way through the trunk and back.

    Call `output`, then `send_back` with the gradient by the output, then `finish`. Between the calls the client may
    work on further micro-batches, while the trunk works on this micro-batch.

    Attributes:
        sums: Router sums behind the trunk, after `output`. The sums require a gradient if the output does. None
            without an auxiliary loss.
        norm: With clipping, squared norm of the step's gradient by the trunk's adapter, after `finish` of the last
            part of the step. The trunk then waits for `scale`. None if the trunk does not learn.
    """

    def __init__(
        self,
        link: Link,
        packet: Packet,
        hidden: Tensor,
        sums: RouterSums | None = None,
        examples: tuple[int, ...] = (),
    ) -> None:
        """Sends the hidden states.

        Args:
            link: Link to the trunk.
            packet: Packet with the hidden states.
            hidden: Output of the bottom (B, T, D), with the bottom's graph.
            sums: Sums of the bottom's routers, with the bottom's graph.
            examples: Numbers of the examples, for codecs.
        """
        self._link = link
        self._packet = packet
        self._hidden = hidden
        self._examples = examples
        self._bottom_sums = sums
        self.sums: RouterSums | None = None
        self.norm: float | None = None
        self._returns = packet.training and link.schedule.expects_backward(packet.wants_gradient)
        # Only a step that stays pending is asked for. Hidden states that wait at a full trunk would fill its memory.
        self._asks = link.asks and self._returns
        admission = replace(packet, tensors={}, shape=tuple(hidden.shape))
        self._first = admission if self._asks else packet
        self._answer = link.trunk.send(self._first)

    def output(self) -> Tensor:
        """Waits for the trunk's output (B, T, D).

        A trunk with too little memory is asked again until memory suffices.

        Returns:
            A leaf of the top's graph. The leaf requires a gradient if the trunk expects a gradient.
        """
        answer = self._settled()
        if self._asks:  # memory is reserved; now the hidden states follow
            self._first = self._packet
            self._answer = self._link.trunk.send(self._packet)
            answer = self._settled()  # the reservation may have expired on the way
        device = self._hidden.device
        if self._bottom_sums is not None:
            packed = EXACT.decode(answer.tensors[SUMS])
            sums = RouterSums.unpacked(packed.to(device))
            self.sums = sums.as_leaf(self._returns)
        role = self._role("activation", "down")
        hidden = self._link.codec.decode(answer.tensors["hidden"], role)
        return hidden.to(device).requires_grad_(self._returns)

    def _role(self, kind: Literal["activation", "gradient"], direction: Literal["up", "down"]) -> Role:
        packet, hidden = self._packet, self._hidden
        return Role(
            kind,
            direction,
            packet.key,
            packet.training,
            hidden.dtype,
            self._examples,
            hidden.numel(),
        )

    def _settled(self) -> Packet:
        """Waits until the trunk has served the first packet."""
        answer = self._answer()
        while answer.wait:
            time.sleep(answer.wait)
            answer = self._link.trunk.send(self._first)()
        return answer

    def send_back(self, gradient: Tensor | None) -> None:
        """Sends the gradients by the output (B, T, D) and by the router sums, if the trunk expects gradients."""
        if not self._returns or gradient is None:
            return
        role = self._role("gradient", "up")
        encoded = self._link.codec.encode(gradient, role)
        tensors = {"gradient": encoded, **self._link.numbers(self._examples)}
        if self.sums is not None and self.sums.probabilities.grad is not None:
            tensors[SUMS] = EXACT.encode(self.sums.probabilities.grad)
        # Without waiting: the client goes on with the next micro-batch, and `finish` takes the answer.
        self._answer = self._link.trunk.send(replace(self._packet, tensors=tensors))

    def finish(self, below: Iterable[Tensor] = ()) -> None:
        """Waits for the gradient by the bottom's output, and computes the bottom's backward.

        Args:
            below: Parameters of the bottom. Only float16 needs the parameters, to scale gradients back.
        """
        if not self._returns:
            return
        answer = self._answer()
        if "gradient" in answer.tensors:
            self._differentiate_bottom(answer.tensors["gradient"], below)
        if "norm" in answer.tensors:
            self.norm = float(EXACT.decode(answer.tensors["norm"]))

    def _differentiate_bottom(self, encoded: Encoded, below: Iterable[Tensor]) -> None:
        """Computes the backward of the bottom, with the trunk's gradient."""
        gradient = self._link.codec.decode(encoded, self._role("gradient", "down"))
        gradient = gradient.to(self._hidden.device)
        if self._bottom_sums is None or not self._bottom_sums.probabilities.requires_grad:
            backward(self._hidden, below, start=gradient)
            return
        assert self.sums is not None and self.sums.probabilities.grad is not None
        # The trunk and the top only add to the bottom's sums, so the gradient by the sums is the same at every part.
        both = [self._hidden, self._bottom_sums.probabilities]
        torch.autograd.backward(both, [gradient, self.sums.probabilities.grad])

    def scale(self, coefficient: float) -> None:
        """Sends the clipping coefficient of the whole step, and waits until the trunk has used the coefficient."""
        value = EXACT.encode(torch.tensor(coefficient, dtype=torch.float64))
        key = self._packet.clipping_key
        request = replace(self._packet, key=key, tensors={"coefficient": value})
        answer = self._link.trunk.send(request)
        answer()  # the next step must not overtake: it would end this step before the trunk learns


@dataclass(frozen=True)
class Link:
    """A client's link to the trunk.

    Attributes:
        trunk: The trunk behind a door.
        codec: New codec of hidden states and gradients, of the same kind as the trunk's codec.
        schedule: Schedule of the trunk. Some schedules need no gradients.
        run: Name of the run, for the keys of steps.
        incarnation: Identity of the trunk's start, for packets.
        attempt: Number of times that the client began the round before.
        asks: True if the trunk has a memory budget. Hidden states are then sent after an admission request.

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
        is_adapted: bool = True,
        examples: tuple[int, ...] = (),
    ) -> PendingStep:
        """Sends hidden states (B, T, D) to the trunk without waiting.

        Args:
            hidden: Output of the bottom.
            key: Step, with batch and micro-batch.
            mask: Mask (B, T), 0 on padding. A mask without padding is not sent.
            micros: Number of micro-batches in the batch.
            training: True for a training step, with dropout and gradients; False for evaluation.
            batches: Number of batches in the step.
            rate: Share of the learning rate for the step.
            sums: Sums of the bottom's routers; None without an auxiliary loss.
            learns: False if the trunk's adapter must not learn from the step.
            is_adapted: False for the trunk's base weights without its adapter. Not for training steps.
            examples: Numbers of the sequences within the client's data, for codecs; empty outside of training.
        """
        key = replace(key, run=self.run, attempt=self.attempt)
        role = Role("activation", "up", key, training, hidden.dtype, examples)
        tensors = {"hidden": self.codec.encode(hidden, role), **self.numbers(examples)}
        if sums is not None:
            tensors[SUMS] = EXACT.encode(sums.packed())
        if mask is not None and not bool(mask.all()):  # a mask of ones changes nothing, and costs bytes
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
            is_adapted=is_adapted,
        )
        return PendingStep(self, packet, hidden, sums, examples)

    def numbers(self, examples: tuple[int, ...]) -> dict[str, Encoded]:
        """Returns the tensor with the numbers of examples; none if there are none, or the codec needs none."""
        if not examples or not self.codec.needs_examples:
            return {}
        return {EXAMPLES: encoded_examples(examples)}

    @torch.no_grad()
    def evaluate(self, hidden: Tensor, key: StepKey, mask: Tensor | None = None) -> Tensor:
        """Sends hidden states (B, T, D) through the trunk without dropout, and waits for the output."""
        return self.send(hidden, key, mask, training=False).output()

    def end(self, key: StepKey) -> None:
        """Ends a decoding session. The trunk frees the session's memory."""
        key = replace(key, run=self.run)
        answer = self.trunk.send(Packet(key, training=False, incarnation=self.incarnation))
        answer()

    def leave(self, client: int) -> None:
        """Tells the trunk that a client's round is over."""
        self.trunk.leave(client)
