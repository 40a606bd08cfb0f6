"""The server half of split learning: the middle blocks of the model, and the adapters that clients train on them.

The server knows nothing of processes and threads. `fedsplit.trunk.dispatch` chooses the next computation, and
`fedsplit.trunk.service` provides the thread.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from torch import Tensor

from fedsplit.adaptation import lora
from fedsplit.clock import Clock
from fedsplit.lowrank import LowRank
from fedsplit.model.facts import positions_of
from fedsplit.model.parts import Trunk
from fedsplit.network.trace import Crossing
from fedsplit.settings.sections import TrainSettings
from fedsplit.stages import StageMaker
from fedsplit.trunk.admission import TRANSIT, Admission
from fedsplit.trunk.answers import Answers
from fedsplit.trunk.backwards import Backwards
from fedsplit.trunk.blocks import Blocks
from fedsplit.trunk.forwards import Forwards
from fedsplit.trunk.gradients import UnclippedGradient
from fedsplit.trunk.intake import Intake
from fedsplit.trunk.memory import Budget
from fedsplit.trunk.pending import PendingBatch
from fedsplit.trunk.port import CODEC
from fedsplit.trunk.registry import AdapterRegistry
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.trunk.state import TrunkState
from fedsplit.trunk.status import RoundCounts, Traffic
from fedsplit.trunk.step_sync import Join
from fedsplit.trunk.trainable import AdapterSnapshot
from fedsplit.trunk.workers import Work
from fedsplit.wire.codecs import Codec, copy_of_state
from fedsplit.wire.packets import Packet, StepKey
from fedsplit.wire.steps import RefusedStep, Steps


class TrunkServer:
    """Serves forwards and backwards of many clients on one set of blocks.

    Each step of an optimiser publishes a new snapshot of the adapter, and a pending forward keeps the older snapshot.
    So a client gets the exact gradient for the weights of the forward, after any number of steps of further clients.

    Attributes:
        part: The blocks, with adapters.
        adapters: Trainable adapters.
        intake: Decoder and checks of clients' tensors.
        answers: Encoder of the trunk's tensors.
        steps: Steps that wait for a gradient or for a clipping coefficient.
        traffic: Bytes that have crossed.
        counts: Events since the round began.
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
        clock: Clock = time.monotonic,
        stage: StageMaker | None = None,
        clients: int | None = None,
        rounds: int | None = None,
        has_predecessor: bool = False,
        has_successor: bool = False,
        join: Join | None = None,
        blocks: Blocks | None = None,
    ) -> None:
        """Takes over a part.

        Args:
            part: The blocks, with adapters.
            codec: New codec of hidden states and gradients, of the same kind as the clients' codecs.
            schedule: Name of a schedule in `fedsplit.trunk.schedules.SCHEDULES`.
            settings: Settings of the optimisers, and limits for the parts of a step.
            seed: Seed of the run, for dropout.
            run: Name of the run. Packets must carry the same name.
            incarnation: Identity of this start of the trunk. Packets must carry the same identity.
            lease: Seconds for which a forward may wait for a backward.
            budget: Budget of resident memory; None for no limit.
            clock: Clock for leases.
            stage: Maker of the strategy's gradient stage for a client's copy; None for a strategy without a stage.
            clients: Number of clients in the run. Packets with a larger number are refused; None accepts all.
            rounds: Number of rounds in the run. Packets of later rounds are refused; None accepts all.
            has_predecessor: True if the packets come from another stage of the trunk.
            has_successor: True if a further stage of the trunk follows.
            join: Way of a replica to the adapter of all replicas; see `AdapterRegistry`.
            blocks: What computes; None for the part itself. Then the part needs no base weights.
        """
        blocks = blocks or Blocks(part, has_successor)
        budget = budget or Budget(None)
        self.part = part
        self._codec_states: dict[int, dict[str, Tensor]] = {}  # after each client's last round that counted
        # The objects below are shared: everything that a step changes is in `TrunkState`, once.
        self.traffic = Traffic()
        self.counts = RoundCounts()
        self.answers = Answers(codec, self.traffic)
        self.intake = Intake(part, codec, blocks.device, has_predecessor)
        self.steps: Steps[PendingBatch | UnclippedGradient] = Steps(
            run,
            incarnation,
            lease=lease,
            clock=clock,
            clients=clients,
            rounds=rounds,
        )
        self.adapters = AdapterRegistry(
            lora.read(part),
            SCHEDULES[schedule],
            settings,
            self.counts,
            device=blocks.device,
            budget=part.rank_budget,
            stage=stage,
            join=join,
        )
        self._state = TrunkState(
            seed=seed,
            settings=settings,
            schedule=SCHEDULES[schedule],
            blocks=blocks,
            adapters=self.adapters,
            steps=self.steps,
            budget=budget,
            admission=Admission(budget, self.steps, lease, clock),
            intake=self.intake,
            answers=self.answers,
            counts=self.counts,
        )
        self._forwards = Forwards(self._state)
        self._backwards = Backwards(self._state)

    def forward(self, packet: Packet) -> Packet:
        """Computes a forward: hidden states (B, T, D) in, hidden states (B, T, D) out; see `begin_forward`."""
        return self.forward_together([packet])[0]

    def backward(self, packet: Packet) -> Packet:
        """Computes a backward: the gradient (B, T, D) by the output in, the gradient by the input out."""
        return self.backward_together([packet])[0]

    def forward_together(self, packets: Sequence[Packet]) -> list[Packet]:
        """Computes the steps of several clients as one forward, and returns the answers."""
        return self.begin_forward(packets).done()

    def backward_together(self, packets: Sequence[Packet]) -> list[Packet]:
        """Computes the backward of steps that had a common forward, and returns the answers."""
        return self.begin_backward(packets).done()

    def begin_forward(self, packets: Sequence[Packet]) -> Work:
        """Begins a forward; see `Forwards.begin`."""
        return self._forwards.begin(packets)

    def begin_backward(self, packets: Sequence[Packet]) -> Work:
        """Begins a backward; see `Backwards.begin`."""
        return self._backwards.begin(packets)

    def ask(self, packet: Packet) -> Packet:
        """Answers an admission request; see `Forwards.ask`."""
        return self._forwards.ask(packet)

    def is_repeat(self, packet: Packet) -> bool:
        """Returns True if a request was served before. A repeated answer changes nothing, and may come at any time."""
        if "gradient" in packet.tensors or packet.clips:
            # Gradients end a pending step, so that a repeat is known by its answer; a forward by its pending step.
            return self.steps.answered(packet.key) is not None
        return packet.training and self.steps.repeated(packet.key) is not None

    def companions(self, key: StepKey) -> set[int]:
        """Returns the clients with a pending step in the same batch as a given step; none if no batch has the step."""
        try:
            batch = self._state.pending_batch(key)
        except RefusedStep:
            return set()
        pending = filter(self.steps.is_pending, batch.inputs)
        return {step.client for step in pending}

    def leave(self, client: int) -> None:
        """Frees all state of a client that has left the round, or is dead."""
        self.counts.abandoned += self.steps.leave(client)  # the graphs of pending steps are freed with the steps
        self._state.admission.leave(client)
        self._state.budget.freed()
        self.adapters.leave(client)

    def expire(self) -> None:
        """Frees forwards and reservations with an expired lease."""
        expired = self.steps.expire()
        if expired:
            self.counts.expired += expired
            self._state.budget.freed()
        self._state.admission.expire()

    def end_round(self, finished: Sequence[int]) -> RoundCounts:
        """Ends the round for all clients.

        Args:
            finished: Clients with a round that counts. State of further clients is dropped.

        Returns:
            Counts of the round.
        """
        for client in self.steps.busy():  # their pending graphs belong to a round that is over
            self.leave(client)
        self.adapters.end_round(finished)
        self._settle_codec(finished)
        return self.counts.take()

    def _settle_codec(self, finished: Sequence[int]) -> None:
        """Keeps the codec's state of clients in `finished`, and restores the earlier state of all further clients."""
        # With error feedback, what a failed attempt has sent must not change what the repeated round sends.
        live = self.answers.codec.state()
        if not (live or self._codec_states):  # a codec without state
            return
        for client in finished:
            self._codec_states[client] = copy_of_state(live.get(client, {}))
        self.answers.codec.restore(self._codec_states)

    def moments(self) -> dict[str, Tensor]:
        """Returns the state of the optimisers, and after a prefix the codec's state of each client."""
        moments = dict(self.adapters.moments())
        for client, state in self._codec_states.items():
            for name, tensor in state.items():
                moments[f"{CODEC}{client}/{name}"] = tensor
        return moments

    def restore(self, tensors: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Sets the shared adapter, the optimisers and the codec to earlier results of `adapters.read` and `moments`.

        Args:
            tensors: Shared adapter by exported name.
            moments: Result of `moments`.
        """
        of_optimizers = {name: value for name, value in moments.items() if not name.startswith(CODEC)}
        self.adapters.restore(tensors, of_optimizers)
        states: dict[int, dict[str, Tensor]] = {}
        for full_name in moments.keys() - of_optimizers.keys():
            client, _, name = full_name.removeprefix(CODEC).partition("/")
            states.setdefault(int(client), {})[name] = moments[full_name]
        # The moments of a staged trunk hold the codecs' states of all stages. The codec picks out its own.
        self.answers.codec.restore(states)
        live = self.answers.codec.state()
        self._codec_states = {client: copy_of_state(state) for client, state in live.items()}

    def inference(self, client: int, snapshot: AdapterSnapshot | None = None) -> tuple[Trunk, AdapterSnapshot]:
        """Returns the part without dropout. The next call of any method may change the part.

        Args:
            client: Number of the client.
            snapshot: Snapshot of an adapter; None for the newest snapshot of the client's adapter.

        Returns:
            The part, and the snapshot in the part.
        """
        if snapshot is None:
            snapshot = self.adapters.of(client, begins=False).snapshot
        return self._state.blocks.inference(snapshot), snapshot

    def has_room(self, tokens: int) -> bool:
        """Returns True if the budget suffices for a number of tokens. Frees graphs of pending batches if needed."""
        return self._state.admission.make_room(tokens, 0.0)

    def fold(self, changes: Mapping[str, LowRank]) -> None:
        """Adds matrices to the base weights for good.

        Args:
            changes: Matrices by layer. Layers of bottom and top are ignored.
        """
        self._state.blocks.fold(changes)

    def unfold(self) -> None:
        """Sets the base weights back to the values at the last `commit`."""
        self._state.blocks.unfold()

    def commit(self) -> None:
        """Makes changes of base weights final. The former weights are no longer kept."""
        self._state.blocks.commit()

    def count(self) -> dict[str, int]:
        """Returns the number of parameters, "total" and "trainable"."""
        counted = lora.count(self.part)
        return counted if self._state.schedule.learns else {**counted, "trainable": 0}

    def take_trace(self) -> tuple[Crossing, ...]:
        """Returns the messages that crossed since the last call; none without a trace."""
        trace = self.answers.trace
        return () if trace is None else tuple(trace.take())

    def calibrate(self, sequences: int, length: int) -> int:
        """Measures the memory of one step, for the budget. The adapter stays as it is.

        Args:
            sequences: Sequences of a step.
            length: Tokens of a sequence.

        Returns:
            Smallest sufficient budget for one step, in bytes.
        """
        budget = self._state.budget
        tokens = sequences * length
        # With the shared adapter: copies have the same shapes, except for smaller ranks.
        graph, working = self._state.blocks.weigh(sequences, length, self.adapters.shared)
        budget.learn(tokens, graph, working)
        nbytes = tokens * self.part.config.hidden_size * self.part.dtype.itemsize
        # The kept input, and hidden states and gradient on their way.
        return budget.least(tokens, (1 + 2 * TRANSIT) * nbytes)

    def measure_step(self) -> float:
        """Measures the seconds of a forward and a backward of the largest batch. The adapter stays as it is."""
        settings, longest = self._state.settings, positions_of(self.part.config)
        shape = settings.batch_size, min(settings.max_length, longest)
        self._state.blocks.weigh(*shape, self.adapters.shared)  # the first step is slower, as memory is allocated
        started = time.perf_counter()
        self._state.blocks.weigh(*shape, self.adapters.shared)
        return time.perf_counter() - started
