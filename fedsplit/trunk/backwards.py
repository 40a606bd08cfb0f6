"""Backwards of the trunk: gradients come up, train the adapter, and go back down to the clients' bottoms.

Shapes: B sequences of T tokens a step, D the width of hidden states, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedsplit.model.routers import SUMS
from fedsplit.optimization.bounds import LARGEST_SHARE, is_bounded
from fedsplit.trunk.blocks import Gradients
from fedsplit.trunk.forwards import beyond
from fedsplit.trunk.intake import check_parts, check_rate, each, refusal
from fedsplit.trunk.pending import Output, PendingBatch
from fedsplit.trunk.registry import UnclippedGradient
from fedsplit.trunk.state import TrunkState
from fedsplit.trunk.trainable import Unusable
from fedsplit.trunk.workers import Work
from fedsplit.wire.casting import EXACT
from fedsplit.wire.packets import Packet, StepKey
from fedsplit.wire.scaling import Overflow
from fedsplit.wire.steps import UnboundedStep, UnknownStep


@dataclass(frozen=True)
class _Gradient:
    """Tensors of a backward request: the gradient by the output (B, T, D), and by the routers' sums (E,)."""

    by_output: Tensor
    by_sums: Tensor | None = None


class Backwards:
    """Serves gradients and clipping coefficients."""

    def __init__(self, state: TrunkState) -> None:
        """Works on the state of a trunk."""
        self._state = state

    def begin(self, packets: Sequence[Packet]) -> Work:
        """Begins the backward of steps that had a common forward.

        Where the schedule learns, the gradient of the adapter goes to its optimiser: at once under `shared` and
        `copies` (after the last part of the step), averaged over the clients under `batched`, and at `close_window`
        under `accumulate`; see `AdapterRegistry`. A gradient that comes again gets the same answer, and does not count
        again.

        With clipping, the gradient waits until the client has sent its coefficient, which comes under the packet's
        `clipping_key`. Until then the step is pending: its lease runs, and the client's next step ends it.

        Args:
            packets: Gradients (B, T, D) of one batch; or one clipping coefficient.

        Raises:
            RefusedStep: A packet must not be served; nothing was done.
        """
        state = self._state
        each(packets, state.steps.check)
        first = packets[0]
        if (known := state.steps.answered(first.key)) is not None:
            state.answers.count(state.answers.traffic.repeated, first, known)
            return Work.answered([known])
        if first.clips:
            return Work.answered([self._clip(first)])

        batch = state.pending_batch(first.key)
        sent = each(packets, lambda packet: self._arrive(packet, batch))
        graph_freed = 0.0 if batch.output is None else -state.budget.graph(batch.tokens)
        state.admission.make_room(batch.tokens, graph_freed, batch)
        kept = batch.output
        batch.output = None

        def compute() -> Gradients:
            found = self._differentiate(batch, kept, sent)
            if found is not None and self._accepts(found):
                return found
            self._leave_out_spoilers(batch, sent)
            found = self._differentiate(batch, None, sent)
            if found is not None and _is_finite(found):
                return found
            raise refusal({key: self._spoilt(key) for key in sent}, len(sent))  # only their sum is too large

        def finish(found: Gradients) -> list[Packet]:
            state.counts.recomputed += kept is None
            return self._answer(batch, packets, *found)

        return Work(compute, finish)

    def _arrive(self, packet: Packet, batch: PendingBatch) -> _Gradient:
        """Decodes and checks what a client sent for a backward.

        Raises:
            RefusedStep: The packet must not be served.
        """
        if packet.key in batch.spoilt:
            raise UnboundedStep(f"{packet.key} was left out, since its hidden states spoilt the gradient of the others")
        check_rate(packet)
        check_parts(packet, self._state.settings)
        intake = self._state.intake
        intake.check_tensors(packet, "gradient", SUMS)
        gradient = intake.gradient(packet, batch.inputs[packet.key])
        by_sums = intake.gradient_by_sums(packet, packet.key in batch.sums) if SUMS in packet.tensors else None
        return _Gradient(gradient, by_sums)

    def _differentiate(
        self, batch: PendingBatch, output: Output | None, sent: Mapping[StepKey, _Gradient]
    ) -> Gradients | None:
        """Returns the gradients of a batch's adapter and inputs; None where float16 cannot hold them.

        Args:
            batch: The batch.
            output: Result of the forward; None to compute the forward again.
            sent: Gradients by step.
        """
        blocks = self._state.blocks
        output = output or blocks.run(batch, keeps_graph=True)
        by_output = {key: gradient.by_output for key, gradient in sent.items()}
        by_sums = {key: gradient.by_sums for key, gradient in sent.items() if gradient.by_sums is not None}
        try:
            return blocks.differentiate(batch, output, by_output, by_sums)
        except Overflow:
            return None

    def _accepts(self, found: Gradients) -> bool:
        """Returns True if gradients can be used for training, and be sent back."""
        of_adapter, of_inputs = found
        return self._state.adapters.accepts(of_adapter) and is_bounded(*of_inputs.values())

    def _leave_out_spoilers(self, batch: PendingBatch, sent: Mapping[StepKey, _Gradient]) -> None:
        """Finds the steps of a batch whose gradients, each computed alone, cannot be used, and leaves them out.

        A single such step spoils the sum over the batch for all clients, even a step with finite hidden states that
        has sent no gradient. Zeros take the place of its hidden states, so that the other rows are computed as before.

        Args:
            batch: The batch.
            sent: Gradients that have come, by step.

        Raises:
            UnboundedStep, SpoiledTogether: Such steps are among the steps with a gradient.
        """
        kind = next(iter(sent.values())).by_output.dtype
        for key, hidden in batch.inputs.items():
            if len(batch.inputs) > 1:
                gradient = sent.get(key, _Gradient(torch.zeros_like(hidden, dtype=kind)))
                found = self._differentiate(batch.only(key), None, {key: gradient})
                if found is not None and self._accepts(found):
                    continue
            batch.spoilt.add(key)
        for key in batch.spoilt:
            hidden = batch.inputs[key]
            batch.inputs[key] = torch.zeros_like(hidden, requires_grad=hidden.requires_grad)
        if spoilt := {key: self._spoilt(key) for key in sent if key in batch.spoilt}:
            raise refusal(spoilt, len(sent))

    def _spoilt(self, key: StepKey) -> UnboundedStep:
        """Returns the refusal of a step whose gradients cannot be used."""
        words = "the gradients that follow from its hidden states and its gradient are not finite"
        if not self._state.adapters.clips:
            words += f", or that of the adapter has a norm above {LARGEST_SHARE:g}, the most without --train.clip"
        return UnboundedStep(f"{key}: {words}{beyond(self._state.blocks.part.dtype)}")

    def _answer(
        self,
        batch: PendingBatch,
        packets: Sequence[Packet],
        of_adapter: Mapping[str, Tensor],
        of_inputs: Mapping[StepKey, Tensor],
    ) -> list[Packet]:
        """Trains the adapter with its gradient, or keeps that for clipping; answers with the inputs' gradients."""
        state = self._state
        state.counts.backwards += 1
        state.budget.freed()
        unclipped = None
        learns = any(packet.learns for packet in packets)
        try:
            if of_adapter and learns:
                unclipped = state.adapters.learn(batch.adapter, batch.snapshot, batch.spent, packets, of_adapter)
        except Unusable as error:
            unmade = {packet.key: UnboundedStep(f"{packet.key}: {error}") for packet in packets}
            raise refusal(unmade, len(packets)) from None

        batch.spent = batch.spent or learns
        answers = state.answers.with_gradients(packets, of_inputs, batch.inputs)
        if unclipped is not None:
            norm = EXACT.encode(torch.tensor(unclipped.squared, dtype=torch.float64))
            state.answers.traffic.gradient.down += norm.nbytes
            answers = [replace(answers[0], tensors={**answers[0].tensors, "norm": norm})]
            state.steps.begin(packets[0].clipping_key, unclipped)
        for packet, answer in zip(packets, answers, strict=True):
            state.steps.answer(packet.key, answer)
        return answers

    def _clip(self, packet: Packet) -> Packet:
        """Uses a step's gradient, scaled by the clipping coefficient that has come."""
        state = self._state
        unclipped = state.steps.held(packet.key)
        if not isinstance(unclipped, UnclippedGradient):
            raise UnknownStep(f"{packet.key} waits for a gradient, not for what it is scaled by")
        state.intake.check_tensors(packet, "coefficient")
        value = state.intake.coefficient(packet, state.adapters.largest_coefficient(unclipped))
        try:
            state.adapters.release(unclipped, value)
        except Unusable as error:
            raise UnboundedStep(f"{packet.key}: {error}") from None
        answer = Packet(packet.key)
        state.answers.count(state.answers.traffic.gradient, packet, answer)
        state.steps.answer(packet.key, answer)
        return answer


def _is_finite(found: Gradients) -> bool:
    """Returns True if gradients of an adapter and of inputs are finite, and their squares, too."""
    of_adapter, of_inputs = found
    return is_bounded(*of_adapter.values()) and is_bounded(*of_inputs.values())
