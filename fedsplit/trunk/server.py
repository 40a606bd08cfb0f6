"""The server half of a step: the middle of the model, the adapters that clients train on it, their optimisers.

A plain class that knows nothing of processes, of time to wait, or of who comes first: `fedsplit.trunk.dispatch`
decides what is computed next, `fedsplit.trunk.actor` puts both into a process of their own.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fedsplit.adaptation import lora
from fedsplit.config import TrainSettings
from fedsplit.lowrank import LowRank
from fedsplit.model.devices import CPU, device_of
from fedsplit.model.parts import Trunk
from fedsplit.model.routers import SUMS, RouterSums, listening
from fedsplit.seeds import derive_seed
from fedsplit.trunk.learner import Learner, Version
from fedsplit.trunk.learners import Learners, Withheld
from fedsplit.trunk.memory import Budget, peak_memory, resident_memory
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.wire.codecs import EXACT, Codec
from fedsplit.wire.packets import Packet, StepKey
from fedsplit.wire.scaling import Overflow, gradients
from fedsplit.wire.steps import RefusedStep, SpoiledStep, StaleStep, Steps, UnknownStep

WAIT_SECONDS = 0.05
"""After how long a client that found no room may ask again."""

_TRANSIT = 3
"""Times a packet's bytes that it takes while it arrives: in the transport's buffers, and as what is kept."""


@dataclass(frozen=True)
class _Output:
    """What a forward makes, with its graph.

    Attributes:
        hidden: All rows, the longest, D.
        sums: Of the routers, by step, where a step has them.
    """

    hidden: Tensor
    sums: Mapping[StepKey, RouterSums]


@dataclass(eq=False)
class _Flight:
    """A forward of one client, or of several at once, of which some backward has not come.

    Attributes:
        inputs: Hidden states as they came, leaves of the graph, by step.
        masks: Masks of those that are padded.
        learner: Whose adapter it is computed with.
        version: Which version of it.
        seed: Of its dropout.
        sums: Of the bottom's routers, of those that have an auxiliary loss, which is each client's own.
        output: The result with its graph; None where it must be computed again.
        spent: A backward has been made; those that come later are late.
    """

    inputs: dict[StepKey, Tensor]
    masks: dict[StepKey, Tensor]
    learner: Learner
    version: Version
    seed: int
    sums: dict[StepKey, RouterSums] = field(default_factory=dict)
    output: _Output | None = None
    spent: bool = False

    def join(self) -> tuple[Tensor, Tensor | None]:
        """All inputs as one batch, shorter sequences padded at the end, which no earlier token can see."""
        length = max(hidden.shape[1] for hidden in self.inputs.values())
        rows = [nn.functional.pad(h, (0, 0, 0, length - h.shape[1])) for h in self.inputs.values()]
        if not self.masks:
            return rows[0] if len(rows) == 1 else torch.cat(rows), None
        whole = {
            key: torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
            for key, hidden in self.inputs.items()
        }
        masks = [nn.functional.pad(m, (0, length - m.shape[1])) for m in {**whole, **self.masks}.values()]
        return torch.cat(rows), torch.cat(masks)

    def cut(self, joined: Tensor) -> dict[StepKey, Tensor]:
        """A joined tensor (all rows, longest, D) to each step's own."""
        rows = joined.split([hidden.shape[0] for hidden in self.inputs.values()])
        return {key: row[:, : hidden.shape[1]] for row, (key, hidden) in zip(rows, self.inputs.items(), strict=True)}


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draws dropout from a seed of its own and leaves the global state as it was."""
    with torch.random.fork_rng(devices=[] if device == CPU else [device], device_type=device.type):
        torch.manual_seed(seed)
        yield


class TrunkServer:
    """Answers forwards and backwards of many clients on one set of blocks.

    The adapter exists in versions that never change: a step publishes a new one, and a forward that is
    pending keeps the version it was computed with. So the gradient a client gets back is exact for the
    weights its activations came from, however many steps of others lie between.

    Attributes:
        learners: The adapters that learn.
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
        """
        self._part, self._codec, self._seed = part, codec, seed
        self._device = device_of(part)
        self._schedule = SCHEDULES[schedule]
        # Where a version is put before it computes. `torch.func.functional_call` does the same, but looks at
        # every parameter of the part each time, which takes 3 % of a step of the bundled model.
        self._slots = {lora.exported_name(part, n): _slot(part, n) for n in lora.local_parameters(part)}
        self._placed: Version = dict(lora.parameters(part))  # what is there has a rank, too
        self._budget = budget or Budget(None)
        self._promised: dict[StepKey, tuple[int, float]] = {}
        self._clock, self._lease = clock, lease
        self.steps: Steps[_Flight | Withheld] = Steps(run, incarnation, lease, clock)
        self.traffic: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.learners = Learners(lora.read(part), self._schedule, settings, self.counts, self._device, part.budget)

    def _place(self, version: Version) -> None:
        """Puts a version where the part's layers look for it."""
        for name, (module, leaf) in self._slots.items():
            module._parameters[leaf] = version[name]  # type: ignore[assignment]  # a leaf that is no nn.Parameter
        if any(tensor.shape != version[name].shape for name, tensor in self._placed.items()):
            lora.rescale(self._part)
        self._placed = version

    def _run(self, flight: _Flight, keeps_graph: bool, training: bool = True) -> _Output:
        if self._part.training != training:
            self._part.train(training)
        hidden, mask = flight.join()
        self._place(flight.version)
        with torch.set_grad_enabled(keeps_graph), _seeded(flight.seed, self._device):
            if not flight.sums:
                return _Output(self._part(hidden, mask), {})
            with listening(self._part) as heard:
                output = self._part(hidden, mask)
            return _Output(output, self._sums_behind(flight, heard, hidden.shape[:2]))

    def _sums_behind(self, flight: _Flight, heard: Sequence[Tensor], shape: Sequence[int]) -> dict[StepKey, RouterSums]:
        """Each step's sums with its own rows of what the routers said of the joined batch, (rows, longest) tokens."""
        own = [flight.cut(probabilities.unflatten(0, tuple(shape))) for probabilities in heard]
        chosen = self._part.config.num_experts_per_tok
        return {
            key: sums.after([layer[key].flatten(0, 1) for layer in own], chosen, flight.masks.get(key))
            for key, sums in flight.sums.items()
        }

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
        if self.steps.repeated(packet.key) is not None or packet.key in self._promised:
            return Packet(packet.key)
        self.steps.check_order(packet.key)
        self.steps.moves_on(packet.key)
        tokens, nbytes = math.prod(packet.shape[:-1]), math.prod(packet.shape) * self._part.dtype.itemsize
        if not self._make_room(tokens, self._bytes_to_come() + 2 * _TRANSIT * nbytes):
            self.counts["waits"] += 1
            return Packet(packet.key, wait=WAIT_SECONDS)
        self._promised[packet.key] = _TRANSIT * nbytes, self._clock() + self._lease
        return Packet(packet.key)

    def _bytes_to_come(self) -> int:
        """What is on its way, or may be at any time: hidden states that were promised room, and gradients."""
        hidden = sum(size for size, _ in self._promised.values())
        flights = {id(flight): flight for flight in self._flights()}.values()
        pending = ((key, tensor) for flight in flights for key, tensor in flight.inputs.items())
        return 2 * hidden + _TRANSIT * sum(tensor.nbytes for key, tensor in pending if self.steps.is_pending(key))

    def _make_room(self, tokens: int, kept: float, own: _Flight | None = None) -> bool:
        """Whether a step can be computed and so many bytes be kept; for that, others' graphs may have to go."""
        if self._budget.fits(tokens, kept):
            return True
        graphs = [flight for flight in self._flights() if flight.output is not None and flight is not own]
        for flight in graphs:
            flight.output = None
            self._budget.freed()
        if not graphs and not len(self.steps) and not self.steps.drop_answers():
            return False
        self._budget.freed()
        return self._budget.fits(tokens, kept)

    def forward_together(self, packets: Sequence[Packet]) -> list[Packet]:
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
        for packet in packets:
            self.steps.check(packet)
        first = packets[0]
        keeps = first.training and self._schedule.expects_backward(first.wants_gradient)
        if keeps and (again := self.steps.repeated(first.key)) is not None:
            if isinstance(again, Withheld):
                raise StaleStep(f"{first.key}: its gradient has come already")
            output = again.output or self._run(again, keeps_graph=False)
            answers = {first.key: again.cut(output.hidden.detach())[first.key]}
            return self._answer("repeated", "hidden", packets, answers, output.sums)
        for packet in packets:
            self._promised.pop(packet.key, None)
        inputs = {packet.key: self._hidden(packet) for packet in packets}
        routers = {packet.key: self._sums(packet) for packet in packets if SUMS in packet.tensors}
        if keeps:
            for packet in packets:
                self.steps.check_order(packet.key)
        room, count = self._room(list(inputs.values())) if keeps else ("none", len(packets))
        served = packets[:count]
        answers = {}
        sums: Mapping[StepKey, RouterSums] = {}
        if served:
            flight = self._take_off(served, inputs, routers, keeps)
            output = self._run(flight, keeps_graph=room == "graph", training=first.training)
            flight.output = output if room == "graph" else None
            if keeps:
                for key in flight.inputs:
                    self.steps.begin(key, flight)
            answers, sums = flight.cut(output.hidden.detach()), output.sums
            self.counts["forwards"] += 1
        self.counts["waits"] += len(packets) - count
        what = "activation" if first.training else "evaluation_activation"
        return [
            *self._answer(what, "hidden", served, answers, sums),
            *(Packet(packet.key, wait=WAIT_SECONDS) for packet in packets[count:]),
        ]

    def _hidden(self, packet: Packet) -> Tensor:
        hidden = self._codec.decode(packet.tensors["hidden"]).to(self._device)
        width = self._part.config.hidden_size
        if hidden.ndim != 3 or hidden.shape[2] != width or not hidden.numel():
            raise SpoiledStep(f"{packet.key} sent hidden states of shape {tuple(hidden.shape)}, not (B, T, {width})")
        return hidden.requires_grad_(packet.training and packet.wants_gradient and self._schedule.returns_gradient)

    def _sums(self, packet: Packet) -> RouterSums:
        sums, size = EXACT.decode(packet.tensors[SUMS]), 2 * self._part.experts + 1
        if sums.shape != (size,) or not torch.isfinite(sums).all():
            raise SpoiledStep(f"{packet.key} sent {tuple(sums.shape)} as sums of routers, not {size} finite numbers")
        return RouterSums.unpacked(sums)

    def _room(self, inputs: Sequence[Tensor]) -> tuple[str, int]:
        """What may be kept of a flight, and for how many of its steps there is room."""
        if self._budget.limit is None:
            return "graph", len(inputs)
        count, to_come = len(inputs), self._bytes_to_come()
        while count:
            rows, length = sum(h.shape[0] for h in inputs[:count]), max(h.shape[1] for h in inputs[:count])
            kept = to_come + (1 + _TRANSIT) * sum(hidden.nbytes for hidden in inputs[:count])
            room = self._budget.room(rows * length, kept)
            if room != "none" or (count == 1 and self._make_room(rows * length, kept)):
                return room, count
            count //= 2
        return "none", 0

    def _take_off(
        self,
        packets: Sequence[Packet],
        inputs: Mapping[StepKey, Tensor],
        routers: Mapping[StepKey, RouterSums],
        keeps: bool,
    ) -> _Flight:
        padded = [packet for packet in packets if "mask" in packet.tensors]
        masks = {packet.key: self._codec.decode(packet.tensors["mask"]).to(self._device) for packet in padded}
        learner = self.learners.of(packets[0].key.client, begins=keeps)
        path = [(p.key.round, p.key.client, p.key.step, p.key.batch * p.micros + p.key.micro) for p in packets]
        flown = {packet.key: inputs[packet.key] for packet in packets}
        sums = {key: routers[key] for key in flown if key in routers}
        return _Flight(flown, masks, learner, learner.version, derive_seed(self._seed, "trunk", *path), sums)

    def backward_together(self, packets: Sequence[Packet]) -> list[Packet]:
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
        for packet in packets:
            self.steps.check(packet)
        if (known := self.steps.answered(packets[0].key)) is not None:
            self._count("repeated", packets[0], known)
            return [known]
        if packets[0].clips:
            return [self._scale(packets[0])]
        flight = self._flight(packets[0].key)
        for packet in packets:
            _check_rate(packet)
        sent = {packet.key: self._gradient(packet, flight) for packet in packets}
        by_sums = {packet.key: self._gradient_by_sums(packet, flight) for packet in packets if SUMS in packet.tensors}
        returned, withheld = self._differentiate(flight, packets, sent, by_sums)
        narrow = flight.inputs[packets[0].key].dtype
        answers = self._answer("gradient", "gradient", packets, returned, narrow=narrow)
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
        value = EXACT.decode(packet.tensors["coefficient"])
        if value.ndim or not 0 <= float(value) <= 1:
            raise SpoiledStep(f"{packet.key} sent {value.tolist()} to scale its gradient by, not a number from 0 to 1")
        self.learners.release(withheld, float(value))
        answer = Packet(packet.key)
        self._count("gradient", packet, answer)
        self.steps.answer(packet.key, answer)
        return answer

    def _flight(self, key: StepKey) -> _Flight:
        """The pending forward of a step.

        Raises:
            RefusedStep: None is pending.
        """
        held = self.steps.held(key)
        if isinstance(held, Withheld):
            raise UnknownStep(f"no forward is pending for {key}")
        return held

    def _flights(self) -> list[_Flight]:
        return [held for held in self.steps.pending() if isinstance(held, _Flight)]

    def _gradient(self, packet: Packet, flight: _Flight) -> Tensor:
        gradient = self._codec.decode(packet.tensors["gradient"]).to(self._device)
        if gradient.shape != (expected := flight.inputs[packet.key].shape):
            raise SpoiledStep(f"{packet.key} sent a gradient of shape {tuple(gradient.shape)}, not {tuple(expected)}")
        if not torch.isfinite(gradient).all():
            raise SpoiledStep(f"{packet.key} sent NaN or infinite values as its gradient")
        return gradient

    def _gradient_by_sums(self, packet: Packet, flight: _Flight) -> Tensor:
        gradient, size = EXACT.decode(packet.tensors[SUMS]), self._part.experts
        if packet.key not in flight.sums or gradient.shape != (size,) or not torch.isfinite(gradient).all():
            raise SpoiledStep(f"{packet.key} sent a gradient by sums of routers that is not {size} finite numbers")
        return gradient

    def _differentiate(
        self,
        flight: _Flight,
        packets: Sequence[Packet],
        sent: Mapping[StepKey, Tensor],
        by_sums: Mapping[StepKey, Tensor],
    ) -> tuple[dict[StepKey, Tensor], Withheld | None]:
        """The gradients of a flight's inputs; those of its adapter go on to the learner, or are withheld."""
        tokens = sum(hidden.shape[0] * hidden.shape[1] for hidden in flight.inputs.values())
        self._make_room(tokens, 0 if flight.output is None else -self._budget.graph(tokens), flight)
        if flight.output is None:
            flight.output = self._run(flight, keeps_graph=True)
            self.counts["recomputed"] += 1
        learned = {name: tensor for name, tensor in flight.version.items() if tensor.requires_grad}
        wanted = {key: flight.inputs[key] for key in sent if flight.inputs[key].requires_grad}
        output, flight.output = flight.output, None
        sums = {key: output.sums[key].probabilities for key in by_sums}
        routed = [key for key, probabilities in sums.items() if probabilities.requires_grad]
        found = _gradients(
            [output.hidden, *(sums[key] for key in routed)],
            [*learned.values(), *wanted.values()],
            [_spread(flight, output.hidden, sent), *(by_sums[key] for key in routed)],
            packets,
        )
        self.counts["backwards"] += 1
        self._budget.freed()
        withheld = None
        if learned:
            of_adapter = dict(zip(learned, found, strict=False))
            withheld = self.learners.learn(flight.learner, flight.version, flight.spent, packets, of_adapter)
        flight.spent = True
        return dict(zip(wanted, found[len(learned) :], strict=True)), withheld

    def leave(self, client: int) -> None:
        """A client has ended its round, or is dead: what is pending of it is freed."""
        self.counts["abandoned"] += self.steps.leave(client)
        self._promised = {key: promise for key, promise in self._promised.items() if key.client != client}
        self._budget.freed()
        self.learners.leave(client)

    def expire(self) -> None:
        """Frees forwards whose lease has run out."""
        if count := self.steps.expire():
            self.counts["expired"] += count
            self._budget.freed()
        now = self._clock()
        self._promised = {key: promise for key, promise in self._promised.items() if promise[1] > now}

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
        if self._part.training:
            self._part.eval()
        self._place(version)
        return self._part, version

    def has_room(self, tokens: int) -> bool:
        """Whether so many tokens can be computed under the budget; others' graphs may have to go for it."""
        return self._make_room(tokens, 0.0)

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
        size = batch, length, self._part.config.hidden_size
        hidden = torch.zeros(size, dtype=self._part.dtype, device=self._device, requires_grad=True)
        flight = _Flight({StepKey(0, 0, 0): hidden}, {}, self.learners.shared, self.learners.shared.version, 0)
        storages: dict[int, int] = {}
        own = {tensor.untyped_storage().data_ptr() for tensor in (*self._part.parameters(), *flight.version.values())}

        def saved(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        before = resident_memory()
        with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
            output = self._run(flight, keeps_graph=True).hidden
        inputs = [hidden, *(tensor for tensor in flight.version.values() if tensor.requires_grad)]
        _gradients([output], inputs, [torch.zeros_like(output)], [Packet(StepKey(0, 0, 0))])
        graph = sum(storages.values())
        self._budget.learn(batch * length, graph, max(peak_memory() - before, graph))
        del output
        return self._budget.least(batch * length, (1 + 2 * _TRANSIT) * hidden.nbytes)

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


def _check_rate(packet: Packet) -> None:
    """Makes sure that a client asks for no more than the whole learning rate.

    Raises:
        SpoiledStep: It does.
    """
    if not 0 <= packet.rate <= 1:
        raise SpoiledStep(f"{packet.key} asks for {packet.rate} of the learning rate, not a share from 0 to 1")


def _gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], starts: Sequence[Tensor], packets: Sequence[Packet]
) -> Sequence[Tensor]:
    """The gradients of leaves, given those of the outputs; in float32 where there is one output in float16."""
    if outputs[0].dtype != torch.float16:
        return torch.autograd.grad(outputs, inputs, starts)
    try:
        found = gradients(outputs[0], inputs, starts[0])
    except Overflow as error:
        raise SpoiledStep(f"{packets[0].key}: {error}") from None
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(inputs, found, strict=True)]


def _slot(part: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that has a parameter, and what the parameter is called there."""
    path, _, leaf = name.rpartition(".")
    return part.get_submodule(path), leaf


def _spread(flight: _Flight, output: Tensor, sent: Mapping[StepKey, Tensor]) -> Tensor:
    """The gradients of some steps of a flight as one of its output; zero where none came."""
    if len(flight.inputs) == 1:
        return next(iter(sent.values()))
    whole = torch.zeros_like(output, dtype=next(iter(sent.values())).dtype)
    for key, place in flight.cut(whole).items():
        if key in sent:
            place.copy_(sent[key])
    return whole
