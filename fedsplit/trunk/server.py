"""The server half of split learning: the middle blocks of the model, and the adapters that clients train on them.

Knows nothing of processes and threads: `fedsplit.trunk.dispatch` decides what is computed next, and
`fedsplit.trunk.service` runs both.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from torch import Tensor

from fedsplit.adaptation import folding, lora
from fedsplit.clock import Clock
from fedsplit.lowrank import LowRank
from fedsplit.model.parts import Trunk
from fedsplit.settings.sections import TrainSettings
from fedsplit.stages import StageMaker
from fedsplit.trunk.admission import TRANSIT, Admission
from fedsplit.trunk.answers import Answers
from fedsplit.trunk.backwards import Backwards
from fedsplit.trunk.blocks import Blocks
from fedsplit.trunk.forwards import Forwards
from fedsplit.trunk.intake import Intake
from fedsplit.trunk.memory import Budget
from fedsplit.trunk.pending import PendingBatch
from fedsplit.trunk.registry import AdapterRegistry, UnclippedGradient
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.trunk.state import TrunkState
from fedsplit.trunk.status import RoundCounts, Traffic
from fedsplit.trunk.trainable import AdapterSnapshot
from fedsplit.trunk.workers import Work
from fedsplit.wire.codecs import Codec, copy_of_state
from fedsplit.wire.packets import Packet, StepKey
from fedsplit.wire.steps import RefusedStep, Steps

_CODEC = "codec/"
"""Prefix of the codec's state among the moments."""


class TrunkServer:
    """Serves forwards and backwards of many clients on one set of blocks.

    Each step of an optimiser publishes a new snapshot of the adapter, and a pending forward keeps the snapshot it was
    computed with. So the gradient that a client gets is exact for the weights its activations came from, however many
    steps of other clients lie between.

    Attributes:
        part: The blocks, with adapters.
        adapters: Trainable adapters.
        intake: Decodes and checks what clients send.
        answers: Encodes what goes back.
        steps: Steps that wait for a gradient, or for the clipping coefficient of theirs.
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
    ) -> None:
        """Takes over a part.

        Args:
            part: The blocks, with adapters.
            codec: Codec of hidden states and gradients, a new one of the kind that clients use.
            schedule: Name of a schedule in `fedsplit.trunk.schedules.SCHEDULES`.
            settings: Settings of the optimisers, and of the parts that a step may have.
            seed: Seed of the run, for dropout.
            run: Name of the run, which packets must carry.
            incarnation: Identity of one start of the trunk, which packets must carry.
            lease: Seconds for which a forward may wait for its backward.
            budget: Budget of resident memory; none where not given.
            clock: Clock for leases.
            stage: Makes the strategy's gradient stage for a client's copy; None where the strategy has none.
            clients: Number of clients in the run; packets of others are refused. None: any number may come.
            rounds: Number of rounds in the run; packets of later ones are refused. None: any number may come.
        """
        blocks = Blocks(part)
        self.part = part
        self._committed: dict[str, Tensor] = {}  # former base weights of layers that changed since the last commit
        self._codec_states: dict[int, dict[str, Tensor]] = {}  # after each client's last round that counted
        self.traffic = Traffic()
        self.counts = RoundCounts()
        self.answers = Answers(codec, self.traffic)
        self.intake = Intake(part, codec, blocks.device)
        self.steps: Steps[PendingBatch | UnclippedGradient] = Steps(run, incarnation, lease, clock, clients, rounds)
        self.adapters = AdapterRegistry(
            lora.read(part), SCHEDULES[schedule], settings, self.counts, blocks.device, part.rank_budget, stage
        )
        budget = budget or Budget(None)
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
        """Computes the steps of several clients as one forward, and returns their answers."""
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
        """Returns True if a request was served before, so that answering it computes nothing new."""
        if "gradient" in packet.tensors or packet.clips:
            return self.steps.answered(packet.key) is not None
        return packet.training and self.steps.repeated(packet.key) is not None

    def companions(self, key: StepKey) -> set[int]:
        """Returns the clients with a step in the pending batch of a given step; none if no batch has the step."""
        try:
            batch = self._state.pending_batch(key)
        except RefusedStep:
            return set()
        return {other.client for other in batch.inputs if self.steps.is_pending(other)}

    def leave(self, client: int) -> None:
        """Frees everything kept for a client that has ended its round, or is dead."""
        self.counts.abandoned += self.steps.leave(client)
        self._state.admission.leave(client)
        self._state.budget.freed()
        self.adapters.leave(client)

    def expire(self) -> None:
        """Frees forwards and reservations whose lease has run out."""
        if count := self.steps.expire():
            self.counts.expired += count
            self._state.budget.freed()
        self._state.admission.expire()

    def end_round(self, finished: Sequence[int]) -> RoundCounts:
        """Ends the round for all clients.

        Args:
            finished: Clients whose round counts. State of further clients is dropped.

        Returns:
            Counts of the round.
        """
        for client in self.steps.busy():
            self.leave(client)
        self.adapters.end_round(finished)
        self._settle_codec(finished)
        return self.counts.take()

    def _settle_codec(self, finished: Sequence[int]) -> None:
        """Keeps the codec's state for clients whose round counts, and restores the earlier state for the rest."""
        live = self.answers.codec.state()
        if not (live or self._codec_states):
            return
        self._codec_states |= {client: copy_of_state(live[client]) for client in finished if client in live}
        self.answers.codec.restore(self._codec_states)

    def moments(self) -> dict[str, Tensor]:
        """Returns the state of the optimisers, and after a prefix the codec's state of each client."""
        of_codec = {
            f"{_CODEC}{client}/{name}": tensor
            for client, state in self._codec_states.items()
            for name, tensor in state.items()
        }
        return {**self.adapters.moments(), **of_codec}

    def restore(self, tensors: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Sets the shared adapter, the optimisers and the codec to what `adapters.read` and `moments` returned earlier.

        Args:
            tensors: Shared adapter by exported name.
            moments: Result of `moments`.
        """
        of_optimizers = {name: value for name, value in moments.items() if not name.startswith(_CODEC)}
        self.adapters.restore(tensors, of_optimizers)
        self._codec_states = {}
        for full_name in moments.keys() - of_optimizers.keys():
            client, _, name = full_name.removeprefix(_CODEC).partition("/")
            self._codec_states.setdefault(int(client), {})[name] = moments[full_name]
        self.answers.codec.restore(self._codec_states)

    def inference(self, client: int, snapshot: AdapterSnapshot | None = None) -> tuple[Trunk, AdapterSnapshot]:
        """Returns the part without dropout, ready to compute until the next call of this object.

        Args:
            client: Client whose newest snapshot is used.
            snapshot: Snapshot to use in its place.

        Returns:
            The part, and the snapshot that it computes with.
        """
        if snapshot is None:
            snapshot = self.adapters.of(client, begins=False).snapshot
        return self._state.blocks.inference(snapshot), snapshot

    def has_room(self, tokens: int) -> bool:
        """Returns True if so many tokens can be computed under the budget; frees graphs of others where needed."""
        return self._state.admission.make_room(tokens, 0.0)

    def fold(self, changes: Mapping[str, LowRank]) -> None:
        """Adds matrices to the base weights for good.

        Args:
            changes: Matrices by layer; layers of other parts are ignored.
        """
        new = changes.keys() - self._committed.keys()
        self._committed |= folding.base_weights(self.part, new)
        folding.fold(self.part, changes)

    def unfold(self) -> None:
        """Sets the base weights back to their values at the last `commit`."""
        folding.put_back(self.part, self._committed)
        self._committed = {}

    def commit(self) -> None:
        """Makes changes of base weights final: their former values are no longer kept."""
        self._committed = {}

    def count(self) -> dict[str, int]:
        """Returns the number of parameters, "total" and "trainable"."""
        counted = lora.count(self.part)
        return counted if self._state.schedule.learns else {**counted, "trainable": 0}

    def calibrate(self, sequences: int, length: int) -> int:
        """Measures the memory of one step, for the budget; the step leaves nothing behind.

        Args:
            sequences: Sequences of a step.
            length: Tokens of a sequence.

        Returns:
            Smallest budget in bytes under which such a step can be served.
        """
        budget = self._state.budget
        tokens = sequences * length
        graph, working = self._state.blocks.weigh(sequences, length, self.adapters.shared)
        budget.learn(tokens, graph, working)
        nbytes = tokens * self.part.config.hidden_size * self.part.dtype.itemsize
        return budget.least(tokens, (1 + 2 * TRANSIT) * nbytes)
