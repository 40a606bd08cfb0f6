"""The server half of a step: the middle of the model, the adapters that clients train on it, their optimisers.

A plain class that knows nothing of processes, of time to wait, or of who comes first: `fedsplit.trunk.dispatch`
decides what is computed next, `fedsplit.trunk.actor` puts both into a process of their own.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedsplit.adaptation import lora
from fedsplit.config import TrainSettings
from fedsplit.lowrank import LowRank
from fedsplit.model.parts import Trunk
from fedsplit.model.routers import SUMS, RouterSums
from fedsplit.optimization.bounds import LARGEST_SHARE, is_bounded
from fedsplit.stages import StageMaker
from fedsplit.trunk.admission import TRANSIT, Admission
from fedsplit.trunk.blocks import Blocks, Gradients
from fedsplit.trunk.flights import Flight, Output, dropout_seed
from fedsplit.trunk.intake import Intake, check_parts, check_rate, each, refusal
from fedsplit.trunk.learner import Unusable, Version
from fedsplit.trunk.learners import Learners, Withheld
from fedsplit.trunk.memory import Budget
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.wire.codecs import EXACT, Codec
from fedsplit.wire.packets import Packet, StepKey
from fedsplit.wire.scaling import TOO_LARGE, Overflow
from fedsplit.wire.steps import RefusedStep, SpoiledStep, StaleStep, Steps, UnboundedStep, UnknownStep

WAIT_SECONDS = 0.05
"""After how long a client that found no room may ask again."""


@dataclass(frozen=True)
class _Arrival:
    """What came for a forward: hidden states (B, T, D), a mask (B, T) of padded ones, and the routers' sums."""

    hidden: Tensor
    mask: Tensor | None
    sums: RouterSums | None


@dataclass(frozen=True)
class _Gradient:
    """What came for a backward: the gradient by the output (B, T, D), and by the routers' sums (E,)."""

    by_output: Tensor
    by_sums: Tensor | None = None


@dataclass(frozen=True)
class Work:
    """A step of the trunk, begun.

    Attributes:
        compute: Does what takes long, and changes nothing that another thread sees: one of forwards and one of
            backwards may run at the same time.
        finish: Takes what that made, and answers; as everything else, for the thread that began it.
    """

    compute: Callable[[], Any]
    finish: Callable[[Any], list[Packet]]

    @classmethod
    def answered(cls, answers: list[Packet]) -> Work:
        """Nothing is to be computed."""
        return cls(lambda: None, lambda _: answers)

    def done(self) -> list[Packet]:
        """Does all of it here and now."""
        return self.finish(self.compute())


class TrunkServer:
    """Answers forwards and backwards of many clients on one set of blocks.

    The adapter exists in versions that never change: a step publishes a new one, and a forward that is
    pending keeps the version it was computed with. So the gradient a client gets back is exact for the
    weights its activations came from, however many steps of others lie between.

    Attributes:
        learners: The adapters that learn.
        intake: Takes in what clients send.
        steps: Which steps are pending: for want of a gradient, or of what theirs is to be scaled by.
        traffic: Bytes by direction ("activation_up", …), of training, under "evaluation_…" of evaluation, and
            under "repeated_…" of what crossed more than once.
        counts: What happened since the round began: "steps" of an optimiser, "forwards" and "backwards" computed,
            forwards computed again ("recomputed"), clients told to wait ("waits"), gradients that came too late
            to count ("late"), leases that ran out ("expired").
    """

    def __init__(
        self,
        part: Trunk,
        codec: Codec,
        schedule: str,
        settings: TrainSettings,
        seed: int,
        *,
        run: str = "",
        incarnation: str = "",
        lease: float = 600.0,
        budget: Budget | None = None,
        clock: Callable[[], float] = time.monotonic,
        stage: StageMaker | None = None,
    ) -> None:
        """Takes over a part.

        Args:
            part: The trunk with its adapters.
            codec: How tensors are encoded, the same at the clients.
            schedule: One of `fedsplit.trunk.schedules.SCHEDULES`.
            settings: The optimiser's.
            seed: The run's seed, for dropout.
            run: The run's name, which requests must carry.
            incarnation: This life of the trunk, which requests must carry.
            lease: Seconds that a forward may wait for its backward.
            budget: For resident memory; none where not given.
            clock: Seconds, for leases.
            stage: Makes the strategy's own gradient stage for a client's copy; None where it has none.
        """
        self._part, self._codec, self._settings, self._seed = part, codec, settings, seed
        self._schedule = SCHEDULES[schedule]
        self._blocks = Blocks(part)
        self.device = self._blocks.device
        self._budget = budget or Budget(None)
        self.intake = Intake(part, codec, self.device)
        self.steps: Steps[Flight | Withheld] = Steps(run, incarnation, lease, clock)
        self._admission = Admission(self._budget, self.steps, lease, clock)
        self.traffic: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        shared = lora.read(part)
        self.learners = Learners(shared, self._schedule, settings, self.counts, self.device, part.budget, stage)

    def forward(self, packet: Packet) -> Packet:
        """Hidden states (B, T, D) in, hidden states (B, T, D) out; as `forward_together` of one."""
        return self.forward_together([packet])[0]

    def backward(self, packet: Packet) -> Packet:
        """The gradient (B, T, D) of the loss by the trunk's output in, by its input out; as `backward_together`."""
        return self.backward_together([packet])[0]

    def is_repeat(self, packet: Packet) -> bool:
        """Whether a request was served before, so that answering it computes nothing new."""
        if "gradient" in packet.tensors or packet.clips:
            return self.steps.answered(packet.key) is not None
        return packet.training and self.steps.repeated(packet.key) is not None

    def companions(self, key: StepKey) -> set[int]:
        """The clients whose steps are pending in the same flight as a step; empty where it is not pending."""
        try:
            flight = self._flight(key)
        except RefusedStep:
            return set()
        return {other.client for other in flight.inputs if self.steps.is_pending(other)}

    def ask(self, packet: Packet) -> Packet:
        """Whether there is room for a step whose hidden states have not been sent; if so, it is kept free.

        Args:
            packet: Without tensors, with their shape.

        Returns:
            An answer; with `wait` above 0 where there is no room now.

        Raises:
            RefusedStep: The packet must not be served.
        """
        self.steps.check(packet)
        check_parts(packet, self._settings)
        width = self._part.config.hidden_size
        if len(packet.shape) != 3 or packet.shape[2] != width or not math.prod(packet.shape):
            raise SpoiledStep(f"{packet.key} asks for room for the shape {packet.shape}, not (B, T, {width})")
        if self.steps.repeated(packet.key) is not None or self._admission.has_promised(packet.key):
            return Packet(packet.key)
        self.steps.check_order(packet.key)
        self.steps.moves_on(packet.key)
        tokens, nbytes = math.prod(packet.shape[:-1]), math.prod(packet.shape) * self._part.dtype.itemsize
        if not self._admission.promise(packet.key, tokens, nbytes):
            self.counts["waits"] += 1
            return Packet(packet.key, wait=WAIT_SECONDS)
        return Packet(packet.key)

    def forward_together(self, packets: Sequence[Packet]) -> list[Packet]:
        """As `begin_forward`, to its end."""
        return self.begin_forward(packets).done()

    def begin_forward(self, packets: Sequence[Packet]) -> Work:
        """One forward of the steps of one or more clients; nobody's padding crosses the wire.

        In training, the graph, or where the budget has no room for it the input alone, is kept until the
        backward of the same key. Dropout is drawn from the run's seed and the keys. A step that comes again
        while it is pending gets the same answer and is kept once.

        Args:
            packets: All of training, or one of evaluation.

        Returns:
            An answer to each; one with `wait` above 0 to those for which there is no room now.

        Raises:
            RefusedStep: A packet must not be served; nothing was done.
        """
        each(packets, self.steps.check)
        first = packets[0]
        keeps = first.training and self._schedule.expects_backward(first.wants_gradient)
        if keeps and (again := self.steps.repeated(first.key)) is not None:
            return self._forward_again(first, again)
        self._admission.redeem(packet.key for packet in packets)
        arrived = each(packets, lambda packet: self._arrive(packet, keeps))
        inputs = [arrival.hidden for arrival in arrived.values()]
        room, count = self._admission.room(inputs) if keeps else ("none", len(packets))
        served, sent_away = packets[:count], packets[count:]
        self.counts["waits"] += len(sent_away)
        waits = [Packet(packet.key, wait=WAIT_SECONDS) for packet in sent_away]
        if not served:
            return Work.answered(waits)
        flight = self._take_off(served, arrived, keeps)

        def compute() -> Output:
            output = self._blocks.run(flight, keeps_graph=room == "graph", training=first.training)
            self._refuse_unbounded(flight, output, len(packets))
            return output

        def finish(output: Output) -> list[Packet]:
            flight.output = output if room == "graph" else None
            if keeps:
                for key in flight.inputs:
                    self.steps.begin(key, flight)
            self.counts["forwards"] += 1
            what = "activation" if first.training else "evaluation_activation"
            return [*self._answer(what, "hidden", served, flight.cut(output.hidden.detach()), output.sums), *waits]

        return Work(compute, finish)

    def _refuse_unbounded(self, flight: Flight, output: Output, together: int) -> None:
        """Refuses those steps of a forward whose hidden states became something that is not finite.

        Args:
            flight: The flight.
            output: What it made.
            together: How many steps were to be served as one; those for which there was no room are in no flight.

        Raises:
            UnboundedStep, SpoiledTogether: There are such steps.
        """
        if is_bounded(output.hidden):
            return
        words = f"the trunk makes values of its hidden states that are not finite{_beyond(output.hidden.dtype)}"
        rows = flight.cut(output.hidden.detach())
        spoilt = {key: UnboundedStep(f"{key}: {words}") for key, own in rows.items() if not is_bounded(own)}
        raise refusal(spoilt or {key: UnboundedStep(f"{key}: {words}") for key in rows}, together)

    def _forward_again(self, packet: Packet, pending: Flight | Withheld) -> Work:
        """The answer to a step that comes again while it is pending: the one that it got before."""
        if isinstance(pending, Withheld):
            raise StaleStep(f"{packet.key}: its gradient has come already")

        def finish(output: Output) -> list[Packet]:
            hidden = {packet.key: pending.cut(output.hidden.detach())[packet.key]}
            return self._answer("repeated", "hidden", [packet], hidden, output.sums)

        output = pending.output
        return Work(lambda: output or self._blocks.run(pending, keeps_graph=False), finish)

    def _arrive(self, packet: Packet, keeps: bool) -> _Arrival:
        """Takes in what a client sent for a forward.

        Raises:
            RefusedStep: The packet must not be served.
        """
        check_parts(packet, self._settings)
        hidden = self.intake.hidden(packet)
        mask = self.intake.mask(packet, hidden) if "mask" in packet.tensors else None
        sums = self.intake.sums(packet) if SUMS in packet.tensors else None
        if keeps:
            self.steps.check_order(packet.key)
        learns = packet.training and packet.wants_gradient and self._schedule.returns_gradient
        return _Arrival(hidden.requires_grad_(learns), mask, sums)

    def _take_off(self, packets: Sequence[Packet], arrived: Mapping[StepKey, _Arrival], keeps: bool) -> Flight:
        """A flight of those steps that are served; with its first that is kept, a client's copy begins."""
        learner = self.learners.of(packets[0].key.client, begins=keeps)
        served = {packet.key: arrived[packet.key] for packet in packets}
        return Flight(
            {key: arrival.hidden for key, arrival in served.items()},
            {key: arrival.mask for key, arrival in served.items() if arrival.mask is not None},
            learner,
            learner.version,
            dropout_seed(self._seed, packets),
            {key: arrival.sums for key, arrival in served.items() if arrival.sums is not None},
        )

    def backward_together(self, packets: Sequence[Packet]) -> list[Packet]:
        """As `begin_backward`, to its end."""
        return self.begin_backward(packets).done()

    def begin_backward(self, packets: Sequence[Packet]) -> Work:
        """One backward of steps whose forward was one.

        Where the schedule learns, the gradient of the adapter goes to the optimiser: at once under `shared` and
        `copies` (after the last part of the step), averaged over the clients under `batched`, and at `close_window`
        under `accumulate`, as `Learners` has it. A gradient that comes again gets the same answer and counts no more.

        With clipping it goes nowhere before the client has sent its coefficient, which comes the same way, under the
        packet's `clipping_key`: until then the step is pending, its lease runs, and its client's next one ends it.

        Args:
            packets: Gradients (B, T, D), of one flight; or one coefficient.

        Raises:
            RefusedStep: A packet must not be served; nothing was done.
        """
        each(packets, self.steps.check)
        if (known := self.steps.answered(packets[0].key)) is not None:
            self._count("repeated", packets[0], known)
            return Work.answered([known])
        if packets[0].clips:
            return Work.answered([self._scale(packets[0])])
        flight = self._flight(packets[0].key)
        sent = each(packets, lambda packet: self._arrive_back(packet, flight))
        tokens = flight.tokens
        self._admission.make_room(tokens, 0 if flight.output is None else -self._budget.graph(tokens), flight)
        kept, flight.output = flight.output, None

        def compute() -> Gradients:
            found = self._differentiate(flight, kept, sent)
            if found is not None and self._takes(found):
                return found
            self._leave_out_spoilers(flight, sent)
            found = self._differentiate(flight, None, sent)
            if found is not None and _is_finite(found):
                return found
            raise refusal({key: self._spoilt(key) for key in sent}, len(sent))  # together they are too much

        def finish(found: Gradients) -> list[Packet]:
            self.counts["recomputed"] += kept is None
            return self._return(flight, packets, *found)

        return Work(compute, finish)

    def _arrive_back(self, packet: Packet, flight: Flight) -> _Gradient:
        """Takes in what a client sent for a backward.

        Raises:
            RefusedStep: The packet must not be served.
        """
        if packet.key in flight.spoilt:
            raise UnboundedStep(f"{packet.key} was left out, since its hidden states spoilt the gradient of the others")
        check_rate(packet)
        check_parts(packet, self._settings)
        gradient = self.intake.gradient(packet, flight.inputs[packet.key].shape)
        by_sums = self.intake.gradient_by_sums(packet, packet.key in flight.sums) if SUMS in packet.tensors else None
        return _Gradient(gradient, by_sums)

    def _differentiate(
        self, flight: Flight, output: Output | None, sent: Mapping[StepKey, _Gradient]
    ) -> Gradients | None:
        """The gradients of a flight's adapter and inputs; None where float16 cannot hold them.

        Args:
            flight: The flight.
            output: Of its forward; where there is none, it is computed again.
            sent: Gradients by step.
        """
        output = output or self._blocks.run(flight, keeps_graph=True)
        by_output = {key: gradient.by_output for key, gradient in sent.items()}
        by_sums = {key: gradient.by_sums for key, gradient in sent.items() if gradient.by_sums is not None}
        try:
            return self._blocks.differentiate(flight, output, by_output, by_sums)
        except Overflow:
            return None

    def _takes(self, found: Gradients) -> bool:
        """Returns whether the gradients of a step can be learned from, and be sent back."""
        of_adapter, of_inputs = found
        return self.learners.takes(of_adapter) and is_bounded(*of_inputs.values())

    def _leave_out_spoilers(self, flight: Flight, sent: Mapping[StepKey, _Gradient]) -> None:
        """Finds the steps of a flight whose gradients, each computed alone, cannot be taken, and leaves them out.

        In the sum over a flight a single one of them spoils those of all, even one that sent finite hidden states and
        no gradient. Of what is left out zeros stay in the flight, so that the others' rows are computed as before.

        Args:
            flight: The flight.
            sent: The gradients that have come, by step.

        Raises:
            UnboundedStep, SpoiledTogether: There are such steps among those that sent a gradient.
        """
        for key, hidden in flight.inputs.items():
            if len(flight.inputs) > 1:
                zeros = torch.zeros_like(hidden, dtype=next(iter(sent.values())).by_output.dtype)
                found = self._differentiate(flight.only(key), None, {key: sent.get(key, _Gradient(zeros))})
                if found is not None and self._takes(found):
                    continue
            flight.spoilt.add(key)
        for key in flight.spoilt:
            flight.inputs[key] = torch.zeros_like(flight.inputs[key], requires_grad=flight.inputs[key].requires_grad)
        if spoilt := {key: self._spoilt(key) for key in sent if key in flight.spoilt}:
            raise refusal(spoilt, len(sent))

    def _spoilt(self, key: StepKey) -> UnboundedStep:
        words = "the gradients that follow from its hidden states and its gradient are not finite"
        if not self.learners.clips:
            words += f", or that of the adapter has a norm above {LARGEST_SHARE:g}, the most without --train.clip"
        return UnboundedStep(f"{key}: {words}{_beyond(self._part.dtype)}")

    def _return(
        self,
        flight: Flight,
        packets: Sequence[Packet],
        of_adapter: Mapping[str, Tensor],
        of_inputs: Mapping[StepKey, Tensor],
    ) -> list[Packet]:
        """Answers with the gradients of a flight's inputs; those of its adapter go to the learner, or are withheld."""
        self.counts["backwards"] += 1
        self._budget.freed()
        withheld = None
        try:
            if of_adapter and any(packet.learns for packet in packets):
                withheld = self.learners.learn(flight.learner, flight.version, flight.spent, packets, of_adapter)
        except Unusable as error:
            unmade = {packet.key: UnboundedStep(f"{packet.key}: {error}") for packet in packets}
            raise refusal(unmade, len(packets)) from None
        flight.spent = True
        narrow = flight.inputs[packets[0].key].dtype
        answers = self._answer("gradient", "gradient", packets, of_inputs, narrow=narrow)
        if withheld is not None:
            norm = EXACT.encode(torch.tensor(withheld.squared, dtype=torch.float64))
            self.traffic["gradient_down"] += norm.nbytes
            answers = [replace(answers[0], tensors={**answers[0].tensors, "norm": norm})]
            self.steps.begin(packets[0].clipping_key, withheld)
        for packet, answer in zip(packets, answers, strict=True):
            self.steps.answer(packet.key, answer)
        return answers

    def _scale(self, packet: Packet) -> Packet:
        """Takes a step's coefficient, with which its gradient counts."""
        withheld = self.steps.held(packet.key)
        if not isinstance(withheld, Withheld):
            raise UnknownStep(f"{packet.key} waits for a gradient, not for what it is scaled by")
        value = self.intake.coefficient(packet, self.learners.largest_coefficient(withheld))
        try:
            self.learners.release(withheld, value)
        except Unusable as error:
            raise UnboundedStep(f"{packet.key}: {error}") from None
        answer = Packet(packet.key)
        self._count("gradient", packet, answer)
        self.steps.answer(packet.key, answer)
        return answer

    def _flight(self, key: StepKey) -> Flight:
        """The pending forward of a step.

        Raises:
            RefusedStep: None is pending.
        """
        held = self.steps.held(key)
        if isinstance(held, Withheld):
            raise UnknownStep(f"no forward is pending for {key}")
        return held

    def leave(self, client: int) -> None:
        """A client has ended its round, or is dead: what is pending of it is freed."""
        self.counts["abandoned"] += self.steps.leave(client)
        self._admission.leave(client)
        self._budget.freed()
        self.learners.leave(client)

    def expire(self) -> None:
        """Frees forwards whose lease has run out."""
        if count := self.steps.expire():
            self.counts["expired"] += count
            self._budget.freed()
        self._admission.expire()

    def end_round(self, finished: Sequence[int]) -> dict[str, int]:
        """Ends the round of all clients, and keeps of those that have not finished it nothing that could wait.

        Args:
            finished: The clients whose round counts.

        Returns:
            `counts` of the round; they begin anew.
        """
        for client in self.steps.busy():
            self.leave(client)
        self.learners.end_round(finished)
        counts = {name: count for name, count in self.counts.items() if count}
        self.counts.clear()
        return counts

    def inference(self, client: int, version: Version | None = None) -> tuple[Trunk, Version]:
        """The part without dropout, ready to compute with an adapter until something else is asked for.

        Args:
            client: Whose adapter: the newest version of it.
            version: The version to take in its place.

        Returns:
            The part, and the version.
        """
        version = self.learners.of(client, begins=False).version if version is None else version
        return self._blocks.inference(version), version

    def has_room(self, tokens: int) -> bool:
        """Whether so many tokens can be computed under the budget; others' graphs may have to go for it."""
        return self._admission.make_room(tokens, 0.0)

    def fold(self, changes: Mapping[str, LowRank]) -> None:
        """Adds matrices to the base weights for good.

        Args:
            changes: By layer; other parts' layers are left out.
        """
        lora.fold(self._part, changes)

    def count(self) -> dict[str, int]:
        """Total and trainable parameters."""
        counted = lora.count(self._part)
        return counted if self._schedule.learns else {**counted, "trainable": 0}

    def calibrate(self, batch: int, length: int) -> int:
        """Runs one step that leaves nothing behind, to see what memory one needs.

        Args:
            batch: Sequences of a step.
            length: Tokens of a sequence.

        Returns:
            The smallest budget under which such a step can be served, in bytes.
        """
        self._budget.learn(batch * length, *self._blocks.weigh(batch, length, self.learners.shared))
        nbytes = batch * length * self._part.config.hidden_size * self._part.dtype.itemsize
        return self._budget.least(batch * length, (1 + 2 * TRANSIT) * nbytes)

    def _answer(
        self,
        what: str,
        name: str,
        packets: Sequence[Packet],
        tensors: Mapping[StepKey, Tensor],
        sums: Mapping[StepKey, RouterSums] | None = None,
        narrow: torch.dtype | None = None,
    ) -> list[Packet]:
        """Tensors as answers, and their bytes counted; gradients in the type of the hidden states, `narrow`."""
        answers = []
        for packet in packets:
            found = {}
            if (tensor := tensors.get(packet.key)) is not None:
                found[name] = self._codec.encode_gradient(tensor, narrow) if narrow else self._codec.encode(tensor)
            if sums and packet.key in sums:
                found[SUMS] = EXACT.encode(sums[packet.key].packed())
            answers.append(Packet(packet.key, found, packet.training))
            self._count(what, packet, answers[-1])
        return answers

    def _count(self, what: str, up: Packet, down: Packet) -> None:
        self.traffic[f"{what}_up"] += up.nbytes
        self.traffic[f"{what}_down"] += down.nbytes


def _is_finite(found: Gradients) -> bool:
    """Returns whether gradients of an adapter and of inputs are finite, and their squares."""
    of_adapter, of_inputs = found
    return is_bounded(*of_adapter.values()) and is_bounded(*of_inputs.values())


def _beyond(kind: torch.dtype) -> str:
    """Returns what to say of values that are not finite, by the type that they were computed in."""
    return f": {TOO_LARGE}" if kind == torch.float16 else ""
