"""Backwards of the trunk: gradients come up, train the adapter, and go back down to the clients' bottoms.

Shapes: B sequences of T tokens a step, D the width of hidden states, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsplit.model.routers import SUMS
from fedsplit.optimization.bounds import LARGEST_SHARE, is_bounded
from fedsplit.trunk.blocks import Gradients
from fedsplit.trunk.forwards import beyond
from fedsplit.trunk.gradients import UnclippedGradient
from fedsplit.trunk.intake import check_parts, check_rate, each, refusal
from fedsplit.trunk.pending import Output, PendingBatch
from fedsplit.trunk.state import TrunkState
from fedsplit.trunk.trainable import Unusable
from fedsplit.trunk.workers import Work
from fedsplit.wire.packets import Packet, StepKey
from fedsplit.wire.scaling import Overflow
from fedsplit.wire.steps import UnboundedStep, UnknownStep


@dataclass(frozen=True)
class _Gradient:
    """Tensors of a backward request.

    Attributes:
        by_output: Gradient by the output of the trunk (B, T, D).
        by_sums: Gradient by the router sums (E,); None without an auxiliary loss.
    """

    by_output: Tensor
    by_sums: Tensor | None = None


class Backwards:
    """Serves gradients and clipping coefficients."""

    def __init__(self, state: TrunkState) -> None:
        """Works on the state of a trunk."""
        self._state = state

    def begin(self, packets: Sequence[Packet]) -> Work:
        """Begins the backward of steps with a common forward.

        Under a schedule that learns, the gradient of the adapter goes to the optimiser: at once under `shared` and
        `copies` (after the last part of the step), averaged over the clients under `batched`, and at `close_window`
        under `accumulate`; see `AdapterRegistry`. A repeated gradient gets the same answer, and counts once.

        With clipping, the gradient waits for the client's coefficient, which comes under the packet's `clipping_key`.
        Until then the step is pending: the lease runs, and the next step of the client ends this step.

        Args:
            packets: Gradients (B, T, D) of one batch, or one clipping coefficient.

        Raises:
            RefusedStep: A packet must not be served; nothing was done.
        """
        state = self._state
        each(packets, state.steps.check)
        first = packets[0]
        known = state.steps.answered(first.key)
        if known is not None:
            state.answers.count(state.answers.traffic.repeated, first, known)
            return Work.answered([known])
        if first.clips:
            return Work.answered([self._clip(first)])

        batch = state.pending_batch(first.key)
        sent = each(packets, lambda packet: self._arrive(packet, batch))
        self._make_room(batch)
        # The batch lets go of the graph: a backward uses the graph up, and a repetition must compute the forward again.
        output = batch.output
        batch.output = None

        def compute() -> Gradients:
            return self._usable_gradients(batch, output, sent)

        def finish(gradients: Gradients) -> list[Packet]:
            state.counts.recomputed += output is None
            return self._answer(batch, packets, *gradients)

        return Work(compute, finish)

    def _make_room(self, batch: PendingBatch) -> None:
        """Makes room for a backward, at best. The backward runs in any case: only a backward ends a pending step."""
        budget = self._state.budget
        has_graph = batch.output is not None
        already_there = budget.graph(batch.tokens) if has_graph else 0.0
        self._state.admission.make_room(batch.tokens, -already_there, batch)

    def _usable_gradients(
        self, batch: PendingBatch, output: Output | None, sent: Mapping[StepKey, _Gradient]
    ) -> Gradients:
        """Returns the gradients of a batch, without the steps that would spoil the gradient of the whole batch.

        Args:
            batch: The batch.
            output: Result of the forward; None to compute the forward again.
            sent: Gradients by step.

        Raises:
            UnboundedStep, SpoiledTogether: Some steps, or all, cannot be used.
        """
        gradients = self._differentiate(batch, output, sent)
        if gradients is not None and self._accepts(gradients):
            return gradients
        # Each step alone, at the cost of one more backward for each: most batches have no spoiler.
        self._leave_out_spoilers(batch, sent)
        # None: the first backward has used up the graph, and its values come from the spoilers, too.
        gradients = self._differentiate(batch, None, sent)
        # `LARGEST_SHARE` bounds what one client adds, and each step alone was within it. The sum of several may exceed
        # it.
        if gradients is not None and _is_finite(gradients):
            return gradients
        # Each step alone is usable, and only the sum is too large. No step is more to blame than the rest.
        raise refusal({key: self._spoilt(key) for key in sent}, len(sent))

    def _arrive(self, packet: Packet, batch: PendingBatch) -> _Gradient:
        """Decodes and checks the tensors of a backward request.

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
        by_sums = None
        if SUMS in packet.tensors:
            by_sums = intake.gradient_by_sums(packet, has_sums=packet.key in batch.sums)
        return _Gradient(gradient, by_sums)

    def _differentiate(
        self, batch: PendingBatch, output: Output | None, sent: Mapping[StepKey, _Gradient]
    ) -> Gradients | None:
        """Returns the gradients of a batch's adapter and inputs, or None if float16 cannot hold the gradients.

        Args:
            batch: The batch.
            output: Result of the forward; None to compute the forward again.
            sent: Gradients by step.
        """
        blocks = self._state.blocks
        output = output or blocks.run(batch, keeps_graph=True)
        by_output = {key: gradient.by_output for key, gradient in sent.items()}
        by_sums = {}
        for key, gradient in sent.items():
            if gradient.by_sums is not None:
                by_sums[key] = gradient.by_sums
        try:
            return blocks.differentiate(batch, output, by_output, by_sums)
        except Overflow:
            return None

    def _accepts(self, gradients: Gradients) -> bool:
        """Returns True if the optimiser can use the gradients of the adapter, and clients the gradients of inputs."""
        of_adapter, of_inputs = gradients
        return self._state.adapters.accepts(of_adapter) and is_bounded(*of_inputs.values())

    def _leave_out_spoilers(self, batch: PendingBatch, sent: Mapping[StepKey, _Gradient]) -> None:
        """Finds the steps of a batch with unusable gradients, and leaves these steps out of the batch.

        A single spoiler spoils the sum over the batch for all clients. Even a step with finite hidden states and no
        gradient can be a spoiler: zero times an infinite value is NaN. Zeros take the place of the spoiler's hidden
        states, so that the remaining rows are computed as before.

        Args:
            batch: The batch.
            sent: Gradients that have come, by step.

        Raises:
            UnboundedStep, SpoiledTogether: Steps with a gradient are among the spoilers.
        """
        kind = next(iter(sent.values())).by_output.dtype
        for key, hidden in batch.inputs.items():
            no_gradient = _Gradient(torch.zeros_like(hidden, dtype=kind))
            gradient = sent.get(key, no_gradient)
            is_single = len(batch.inputs) == 1  # then the step is known to be the spoiler
            if is_single or not self._is_usable_alone(batch, key, gradient):
                batch.spoilt.add(key)
        for key in batch.spoilt:
            hidden = batch.inputs[key]
            batch.inputs[key] = torch.zeros_like(hidden, requires_grad=hidden.requires_grad)
        spoilt = {key: self._spoilt(key) for key in sent if key in batch.spoilt}
        if spoilt:
            raise refusal(spoilt, len(sent))

    def _is_usable_alone(self, batch: PendingBatch, key: StepKey, gradient: _Gradient) -> bool:
        """Returns True if the gradients of one step of a batch, computed without the rest, can be used."""
        gradients = self._differentiate(batch.only(key), None, {key: gradient})
        return gradients is not None and self._accepts(gradients)

    def _spoilt(self, key: StepKey) -> UnboundedStep:
        """Returns the refusal of a step with unusable gradients."""
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
        """Trains the adapter with the gradient, or keeps the gradient for clipping. Answers with inputs' gradients.

        Args:
            batch: The batch.
            packets: The requests.
            of_adapter: Gradients of the adapter by exported name.
            of_inputs: Gradients (B, T, D) of the inputs by step.

        Raises:
            UnboundedStep, SpoiledTogether: The optimiser cannot make a step with the gradient.
        """
        state = self._state
        state.counts.backwards += 1
        state.budget.freed()  # autograd has freed the graph
        unclipped = None
        learns = any(packet.learns for packet in packets)
        try:
            if of_adapter and learns:
                unclipped = state.adapters.learn(
                    batch.adapter,
                    batch.snapshot,
                    spent=batch.spent,
                    packets=packets,
                    gradients=of_adapter,
                )
        except Unusable as error:
            # The step was made for nobody, so that all of its clients are refused alike.
            unmade = {packet.key: UnboundedStep(f"{packet.key}: {error}") for packet in packets}
            raise refusal(unmade, len(packets)) from None

        batch.spent = batch.spent or learns
        learned_from = [batch.inputs[packet.key] for packet in packets if packet.learns]
        state.counts.sequences += sum(map(len, learned_from))
        answers = state.answers.with_gradients(packets, of_inputs, batch.inputs)
        if unclipped is not None:
            # With clipping no schedule joins clients, so there is a single answer.
            answers = [self._with_norm(answers[0], unclipped)]
            state.steps.begin(packets[0].clipping_key, unclipped)
        for packet, answer in zip(packets, answers, strict=True):
            state.steps.answer(packet.key, answer)
        return answers

    def _with_norm(self, answer: Packet, unclipped: UnclippedGradient) -> Packet:
        """Returns an answer with the squared norm of the trunk's gradient, for the client's clipping coefficient."""
        # In float64: the client adds squares of all parts, and float32 would lose the small ones.
        norm = torch.tensor(unclipped.squared, dtype=torch.float64)
        return self._state.answers.with_norm(answer, norm)

    def _clip(self, packet: Packet) -> Packet:
        """Uses the gradient of a step, scaled by the clipping coefficient in a packet."""
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
        state.answers.record("coefficient", packet, answer)
        state.steps.answer(packet.key, answer)
        return answer


def _is_finite(gradients: Gradients) -> bool:
    """Returns True if gradients of an adapter and of inputs are finite, and the squares of the gradients, too."""
    of_adapter, of_inputs = gradients
    return is_bounded(*of_adapter.values()) and is_bounded(*of_inputs.values())
