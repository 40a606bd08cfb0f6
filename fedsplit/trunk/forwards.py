"""Forwards of the trunk: hidden states come up, go through the blocks, and go back down.

Shapes: B sequences of T tokens a step, D the width of hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsplit.model.routers import SUMS, RouterSums
from fedsplit.optimization.bounds import is_bounded
from fedsplit.trunk.gradients import UnclippedGradient
from fedsplit.trunk.intake import check_parts, each, refusal
from fedsplit.trunk.pending import Output, PendingBatch, dropout_seed
from fedsplit.trunk.state import TrunkState
from fedsplit.trunk.workers import Work
from fedsplit.wire.packets import RANDOM, Packet, StepKey
from fedsplit.wire.scaling import TOO_LARGE
from fedsplit.wire.steps import SpoiledStep, StaleStep, UnboundedStep

WAIT_SECONDS = 0.05
"""Seconds until a client may ask again after a refusal for want of memory."""


@dataclass(frozen=True)
class _Arrival:
    """Tensors of a forward request.

    Attributes:
        hidden: Hidden states (B, T, D).
        mask: Mask (B, T); None without padding.
        sums: Sums of the bottom's routers; None without an auxiliary loss.
        random: State of the random generator after the stage below; None from a client.
    """

    hidden: Tensor
    mask: Tensor | None
    sums: RouterSums | None
    random: Tensor | None = None


class Forwards:
    """Serves admission requests and forwards."""

    def __init__(self, state: TrunkState) -> None:
        """Works on the state of a trunk."""
        self._state = state

    def ask(self, packet: Packet) -> Packet:
        """Answers an admission request, and reserves memory for the step if memory suffices.

        Args:
            packet: Packet without tensors, with the shape of the hidden states to come.

        Returns:
            An answer. A `wait` above 0 tells the client to ask again, since memory is short now.

        Raises:
            RefusedStep: The packet must not be served.
        """
        state = self._state
        state.steps.check(packet)
        check_parts(packet, state.settings)
        part = state.blocks.part
        state.intake.check_shape(packet.key, packet.shape, state.settings.batch_size)
        is_pending = state.steps.repeated(packet.key) is not None
        if is_pending or state.admission.has_reserved(packet.key):  # a repeated request must not reserve twice
            return self._admission(packet, 0.0)

        state.steps.check_order(packet.key)
        state.steps.moves_on(packet.key)  # frees answers, so that the step may fit
        tokens = math.prod(packet.shape[:-1])
        nbytes = math.prod(packet.shape) * part.dtype.itemsize
        if state.admission.reserve(packet.key, tokens, nbytes):
            return self._admission(packet, 0.0)
        state.counts.waits += 1
        return self._admission(packet, WAIT_SECONDS)

    def _admission(self, packet: Packet, wait: float) -> Packet:
        """Returns the answer to an admission request, and counts both."""
        answers = self._state.answers
        answer = Packet(packet.key, wait=wait)
        answers.count(answers.traffic.activation, packet, answer)  # no tensors: framing alone
        return answer

    def begin(self, packets: Sequence[Packet]) -> Work:
        """Begins one forward for the steps of one or more clients.

        In training, the graph is kept until the backward of the same keys. If the memory budget is too small for the
        graph, the input alone is kept. Dropout depends on the run's seed and on the keys. A step that is sent again
        while pending gets the same answer, and is kept once.

        Args:
            packets: Packets of training, or a single packet of evaluation.

        Returns:
            Work that makes an answer to each packet. A `wait` above 0 tells the client to ask again, since memory is
            short now.

        Raises:
            RefusedStep: A packet must not be served; nothing was done.
        """
        state = self._state
        each(packets, state.steps.check)
        first = packets[0]
        # The first packet speaks for all: only forwards with the same wish for a gradient are joined (`joinable`).
        keeps = first.training and state.schedule.expects_backward(first.wants_gradient)
        pending = state.steps.repeated(first.key) if keeps else None
        if pending is not None:
            return self._repeat(first, pending)

        # Redeemed before any check: the memory of refused hidden states is free again, too.
        state.admission.redeem(packet.key for packet in packets)
        arrived = each(packets, lambda packet: self._arrive(packet, keeps))
        inputs = [arrival.hidden for arrival in arrived.values()]
        # An evaluation keeps nothing, and the memory to compute one step is always set aside.
        room, count = state.admission.room(inputs) if keeps else ("none", len(packets))
        served = packets[:count]
        waits = self._refuse_for_now(packets[count:])
        if not served:
            return Work.answered(waits)
        batch = self._make_batch(served, arrived, keeps)

        def compute() -> Output:
            output = state.blocks.run(batch, keeps_graph=room == "graph", training=first.training)
            _refuse_unbounded(batch, output, len(packets))
            return output

        def finish(output: Output) -> list[Packet]:
            # Set on the deciding thread: workers must not change what other requests see.
            batch.output = output if room == "graph" else None
            if keeps:
                for key in batch.inputs:
                    state.steps.begin(key, batch)
            return [*self._answer(batch, served, output), *waits]

        return Work(compute, finish)

    def _refuse_for_now(self, packets: Sequence[Packet]) -> list[Packet]:
        """Returns answers that tell clients to ask again, since memory is short."""
        self._state.counts.waits += len(packets)
        return [Packet(packet.key, wait=WAIT_SECONDS) for packet in packets]

    def _answer(self, batch: PendingBatch, packets: Sequence[Packet], output: Output) -> list[Packet]:
        """Returns the answers to the steps of a batch, and counts the forward."""
        state = self._state
        state.counts.forwards += 1
        traffic = state.answers.traffic
        crossed = traffic.activation if packets[0].training else traffic.evaluation_activation
        if not packets[0].is_adapted:
            crossed = traffic.reference
        hidden = batch.cut(output.hidden.detach())
        return state.answers.with_hidden(crossed, packets, hidden, output.sums, output.random)

    def _repeat(self, packet: Packet, pending: PendingBatch | UnclippedGradient) -> Work:
        """Answers a pending step again, with the values of the first answer."""
        if isinstance(pending, UnclippedGradient):
            # Under the key of a coefficient, the step has no forward that could be answered again.
            raise StaleStep(f"{packet.key}: its gradient has come already")
        answers = self._state.answers
        output = pending.output

        # Without a kept output the forward is computed again; snapshot and dropout seed give equal bits.
        def compute() -> Output:
            return output or self._state.blocks.run(pending, keeps_graph=False)

        def finish(output: Output) -> list[Packet]:
            hidden = pending.cut(output.hidden.detach())
            return answers.with_hidden(answers.traffic.repeated, [packet], hidden, output.sums, output.random)

        return Work(compute, finish)

    def _arrive(self, packet: Packet, keeps: bool) -> _Arrival:
        """Decodes and checks the tensors of a forward request.

        Raises:
            RefusedStep: The packet must not be served.
        """
        state = self._state
        check_parts(packet, state.settings)
        if packet.training and not packet.is_adapted:
            raise SpoiledStep(f"{packet.key} trains, and asks for the base weights alone, which never train")
        if keeps:
            state.steps.check_order(packet.key)
        from_a_stage = (RANDOM,) if state.intake.has_predecessor else ()
        state.intake.check_tensors(packet, "hidden", "mask", SUMS, *from_a_stage)
        hidden = state.intake.hidden(packet, state.settings.batch_size)
        mask = state.intake.mask(packet, hidden) if "mask" in packet.tensors else None
        sums = state.intake.sums(packet) if SUMS in packet.tensors else None
        random = state.intake.random(packet) if RANDOM in packet.tensors else None
        # The hidden states become a leaf of the trunk's own graph, since the client's graph ends at the wire.
        returns_gradient = packet.training and packet.wants_gradient and state.schedule.returns_gradient
        return _Arrival(hidden.requires_grad_(returns_gradient), mask, sums, random)

    def _make_batch(self, packets: Sequence[Packet], arrived: Mapping[StepKey, _Arrival], keeps: bool) -> PendingBatch:
        """Returns the steps to serve, as a batch."""
        # The first client's adapter is everybody's: only the shared adapter computes batches of several clients.
        adapter = self._state.adapters.of(packets[0].key.client, begins=keeps)
        # Behind another stage, dropout goes on where the stage stopped: all steps of its batch carry the same state.
        random = arrived[packets[0].key].random
        batch = PendingBatch(
            inputs={},
            masks={},
            adapter=adapter,
            snapshot=adapter.snapshot,
            seed=dropout_seed(self._state.seed, packets) if random is None else random,
            is_adapted=packets[0].is_adapted,
        )
        for packet in packets:
            arrival = arrived[packet.key]
            batch.inputs[packet.key] = arrival.hidden
            if arrival.mask is not None:
                batch.masks[packet.key] = arrival.mask
            if arrival.sums is not None:
                batch.sums[packet.key] = arrival.sums
        return batch


def _refuse_unbounded(batch: PendingBatch, output: Output, together: int) -> None:
    """Refuses the steps of a forward with infinite or NaN values in the output.

    Args:
        batch: The batch.
        output: Result of the batch's forward.
        together: Number of packets to be served together, including packets without memory.

    Raises:
        UnboundedStep, SpoiledTogether: Some steps, or all, have values that are not finite.
    """
    if is_bounded(output.hidden):
        return
    words = f"the trunk makes values of its hidden states that are not finite{beyond(output.hidden.dtype)}"
    by_step = batch.cut(output.hidden.detach())
    spoilt = [key for key, rows in by_step.items() if not is_bounded(rows)]
    if not spoilt:  # the squares of each step are finite, and only the sum over all steps is not
        spoilt = list(by_step)
    raise refusal({key: UnboundedStep(f"{key}: {words}") for key in spoilt}, together)


def beyond(kind: torch.dtype) -> str:
    """Returns advice about values that are not finite, by the type of computation.

    Example:
        >>> beyond(torch.float32)
        ''
        >>> beyond(torch.float16)
        ': values exceed 65504, the most that float16 can hold; --dtype bf16 and fp32 can hold more'
    """
    return f": {TOO_LARGE}" if kind == torch.float16 else ""
