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
from fedsplit.trunk.intake import check_parts, each, refusal
from fedsplit.trunk.pending import Output, PendingBatch, dropout_seed
from fedsplit.trunk.registry import UnclippedGradient
from fedsplit.trunk.state import TrunkState
from fedsplit.trunk.workers import Work
from fedsplit.wire.packets import Packet, StepKey
from fedsplit.wire.scaling import TOO_LARGE
from fedsplit.wire.steps import StaleStep, UnboundedStep

WAIT_SECONDS = 0.05
"""Seconds after which a client that found no memory may ask again."""


@dataclass(frozen=True)
class _Arrival:
    """Tensors of a forward request: hidden states (B, T, D), a mask (B, T) where there is padding, router sums."""

    hidden: Tensor
    mask: Tensor | None
    sums: RouterSums | None


class Forwards:
    """Serves admission requests and forwards."""

    def __init__(self, state: TrunkState) -> None:
        """Works on the state of a trunk."""
        self._state = state

    def ask(self, packet: Packet) -> Packet:
        """Answers an admission request, and reserves memory for the step where there is enough.

        Args:
            packet: Packet without tensors, with the shape of the hidden states that will follow.

        Returns:
            An answer; its `wait` is above 0 where there is too little memory now.

        Raises:
            RefusedStep: The packet must not be served.
        """
        state = self._state
        state.steps.check(packet)
        check_parts(packet, state.settings)
        part = state.blocks.part
        state.intake.check_shape(packet.key, packet.shape, state.settings.batch_size)
        if state.steps.repeated(packet.key) is not None or state.admission.has_reserved(packet.key):
            return Packet(packet.key)

        state.steps.check_order(packet.key)
        state.steps.moves_on(packet.key)
        tokens = math.prod(packet.shape[:-1])
        nbytes = math.prod(packet.shape) * part.dtype.itemsize
        if state.admission.reserve(packet.key, tokens, nbytes):
            return Packet(packet.key)
        state.counts.waits += 1
        return Packet(packet.key, wait=WAIT_SECONDS)

    def begin(self, packets: Sequence[Packet]) -> Work:
        """Begins one forward for the steps of one or more clients.

        In training, the graph is kept until the backward of the same keys; where the memory budget has no room for
        it, the input alone is. Dropout depends on the run's seed and the keys. A step that comes again while it is
        pending gets the same answer, and is kept once.

        Args:
            packets: All of training, or one of evaluation.

        Returns:
            Work that makes an answer to each packet. Packets for which there is no memory now get one with `wait`
            above 0.

        Raises:
            RefusedStep: A packet must not be served; nothing was done.
        """
        state = self._state
        each(packets, state.steps.check)
        first = packets[0]
        keeps = first.training and state.schedule.expects_backward(first.wants_gradient)
        if keeps and (pending := state.steps.repeated(first.key)) is not None:
            return self._repeat(first, pending)

        state.admission.redeem(packet.key for packet in packets)
        arrived = each(packets, lambda packet: self._arrive(packet, keeps))
        inputs = [arrival.hidden for arrival in arrived.values()]
        room, count = state.admission.room(inputs) if keeps else ("none", len(packets))
        served = packets[:count]
        refused = packets[count:]
        state.counts.waits += len(refused)
        waits = [Packet(packet.key, wait=WAIT_SECONDS) for packet in refused]
        if not served:
            return Work.answered(waits)
        batch = self._make_batch(served, arrived, keeps)

        def compute() -> Output:
            output = state.blocks.run(batch, keeps_graph=room == "graph", training=first.training)
            _refuse_unbounded(batch, output, len(packets))
            return output

        def finish(output: Output) -> list[Packet]:
            batch.output = output if room == "graph" else None
            if keeps:
                for key in batch.inputs:
                    state.steps.begin(key, batch)
            state.counts.forwards += 1
            traffic = state.answers.traffic
            crossed = traffic.activation if first.training else traffic.evaluation_activation
            hidden = batch.cut(output.hidden.detach())
            return [*state.answers.with_hidden(crossed, served, hidden, output.sums), *waits]

        return Work(compute, finish)

    def _repeat(self, packet: Packet, pending: PendingBatch | UnclippedGradient) -> Work:
        """Answers a pending step that is sent again, with the values of the first answer."""
        if isinstance(pending, UnclippedGradient):
            raise StaleStep(f"{packet.key}: its gradient has come already")
        answers = self._state.answers
        output = pending.output

        def compute() -> Output:
            return output or self._state.blocks.run(pending, keeps_graph=False)

        def finish(output: Output) -> list[Packet]:
            hidden = pending.cut(output.hidden.detach())
            return answers.with_hidden(answers.traffic.repeated, [packet], hidden, output.sums)

        return Work(compute, finish)

    def _arrive(self, packet: Packet, keeps: bool) -> _Arrival:
        """Decodes and checks what a client sent for a forward.

        Raises:
            RefusedStep: The packet must not be served.
        """
        state = self._state
        check_parts(packet, state.settings)
        if keeps:
            state.steps.check_order(packet.key)
        state.intake.check_tensors(packet, "hidden", "mask", SUMS)
        hidden = state.intake.hidden(packet, state.settings.batch_size)
        mask = state.intake.mask(packet, hidden) if "mask" in packet.tensors else None
        sums = state.intake.sums(packet) if SUMS in packet.tensors else None
        returns_gradient = packet.training and packet.wants_gradient and state.schedule.returns_gradient
        return _Arrival(hidden.requires_grad_(returns_gradient), mask, sums)

    def _make_batch(self, packets: Sequence[Packet], arrived: Mapping[StepKey, _Arrival], keeps: bool) -> PendingBatch:
        """Returns the batch of the steps that are served."""
        adapter = self._state.adapters.of(packets[0].key.client, begins=keeps)
        served = {packet.key: arrived[packet.key] for packet in packets}
        return PendingBatch(
            inputs={key: arrival.hidden for key, arrival in served.items()},
            masks={key: arrival.mask for key, arrival in served.items() if arrival.mask is not None},
            adapter=adapter,
            snapshot=adapter.snapshot,
            seed=dropout_seed(self._state.seed, packets),
            sums={key: arrival.sums for key, arrival in served.items() if arrival.sums is not None},
        )


def _refuse_unbounded(batch: PendingBatch, output: Output, together: int) -> None:
    """Refuses the steps of a forward whose hidden states have become infinite or NaN.

    Args:
        batch: The batch.
        output: Result of its forward.
        together: Number of packets to be served together, including packets without memory.

    Raises:
        UnboundedStep, SpoiledTogether: There are such steps.
    """
    if is_bounded(output.hidden):
        return
    words = f"the trunk makes values of its hidden states that are not finite{beyond(output.hidden.dtype)}"
    by_step = batch.cut(output.hidden.detach())
    spoilt = [key for key, rows in by_step.items() if not is_bounded(rows)] or list(by_step)
    raise refusal({key: UnboundedStep(f"{key}: {words}") for key in spoilt}, together)


def beyond(kind: torch.dtype) -> str:
    """Returns advice about values that are not finite, by the type of computation."""
    return f": {TOO_LARGE}" if kind == torch.float16 else ""
