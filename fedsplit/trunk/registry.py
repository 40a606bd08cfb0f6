"""The trunk's trainable adapters: one for all clients or a copy for each, and when a gradient becomes a step."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedsplit.adaptation.rank_budget import RankBudget
from fedsplit.model.devices import CPU, put
from fedsplit.optimization.bounds import LARGEST_SHARE, norm
from fedsplit.optimization.clipping import coefficient, squared_norm
from fedsplit.optimization.optim import fitting
from fedsplit.settings.sections import TrainSettings
from fedsplit.stages import Outcome, StageMaker
from fedsplit.trunk.schedules import Schedule
from fedsplit.trunk.status import RoundCounts
from fedsplit.trunk.trainable import AdapterSnapshot, TrainableAdapter, Unusable
from fedsplit.updates import Adapters, Task
from fedsplit.wire.packets import Packet, StepKey


@dataclass(frozen=True)
class Start:
    """State in which a client's copy of the trunk's adapter begins a round.

    Attributes:
        tensors: Adapter by exported name; clients may differ in rank.
        task: Instructions of the strategy.
        own: The client's control variate for these tensors.
        afresh: True where the adapter does not continue the client's last one, so that the optimiser's state of
            earlier rounds does not fit it.
        kept: State of the strategy's gradient stage for this copy, from the client's last round.
    """

    tensors: Mapping[str, Tensor]
    task: Task = field(default_factory=Task)
    own: Mapping[str, Tensor] = field(default_factory=dict)
    afresh: bool = False
    kept: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Copy:
    """A client's copy of the trunk's adapter at the end of a round.

    Attributes:
        adapters: Adapter after the client's last step.
        control: Change of the client's control variate.
        kept: State that the strategy's gradient stage keeps of the round.
        steps: Number of steps that trained it; None where nothing of it learns.
    """

    adapters: Adapters
    control: Mapping[str, Tensor]
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    steps: int | None = None


@dataclass
class _GradientSum:
    """Sum of a client's gradients since the last step of the optimiser.

    Attributes:
        parts: Number of gradients by optimiser step.
        rates: Share of the learning rate by optimiser step.
        gradients: The sum by exported name.
        snapshots: Snapshots that the gradients were computed with.
    """

    parts: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    rates: dict[tuple[int, int, int], float] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    snapshots: list[AdapterSnapshot] = field(default_factory=list)

    def add(self, key: StepKey, rate: float, snapshot: AdapterSnapshot, gradients: Mapping[str, Tensor]) -> None:
        """Adds the gradient of one step, or of a part of it."""
        self.parts[key.turn] += 1
        self.rates[key.turn] = rate
        if not any(snapshot is known for known in self.snapshots):
            self.snapshots.append(snapshot)
        self.gradients = self.sum_with(gradients)

    def sum_with(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the sum by exported name as it would be with other gradients added."""
        known = self.gradients
        added = {name: known[name] + gradient if name in known else gradient for name, gradient in gradients.items()}
        return {**known, **added}


@dataclass(frozen=True)
class UnclippedGradient:
    """Gradient of a client's step that waits for its clipping coefficient.

    Attributes:
        adapter: Adapter that it trains.
        whole: Sum over all parts of the step.
        key: The step.
        rate: Share of the learning rate for the step.
    """

    adapter: TrainableAdapter
    whole: _GradientSum
    key: StepKey
    rate: float

    @functools.cached_property
    def squared(self) -> float:
        """Squared norm over the trunk's adapter, in float64."""
        return squared_norm(self.whole.gradients.values())


class AdapterRegistry:
    """Holds the trunk's adapters, and turns gradients into steps of their optimisers as the schedule says.

    Attributes:
        shared: Adapter of all clients; under `copies` the start of every new copy.
    """

    def __init__(
        self,
        start: Adapters,
        schedule: Schedule,
        settings: TrainSettings,
        counts: RoundCounts,
        device: torch.device = CPU,
        budget: RankBudget | None = None,
        stage: StageMaker | None = None,
    ) -> None:
        """Starts with the shared adapter and no copies.

        Args:
            start: The trunk's adapter.
            schedule: How clients share it.
            settings: Settings of the optimisers.
            counts: Counts of the round, of which "steps", "late" and "unusable" are kept here.
            device: Device that the trunk computes on.
            budget: Budget of the trunk's ranks; None where they are fixed.
            stage: Makes the strategy's gradient stage for a copy; None where the strategy has none.
        """
        self._layers = start.layers
        self._schedule = schedule
        self._settings = settings
        self._counts = counts
        self._device = device
        self._budget = budget
        self._make_stage = stage
        self.shared = TrainableAdapter(start.tensors, settings, schedule.learns, device=device, budget=budget)
        self._copies: dict[int, TrainableAdapter] = {}
        self._sums: dict[int, _GradientSum] = {}
        self._unclipped: dict[int, _GradientSum] = {}
        self._moments: dict[int, dict[str, Tensor]] = {}

    @property
    def clips(self) -> bool:
        """True where a step's gradient waits for its clipping coefficient."""
        return self._settings.clip > 0

    def largest_coefficient(self, unclipped: UnclippedGradient) -> float:
        """Returns the largest coefficient that an honest client can send for a gradient.

        The norm over all parts of the model is at least the norm over the trunk's adapter. Scaled by an honest
        coefficient, the trunk's gradient is therefore within the limit, too.
        """
        return coefficient(unclipped.squared, self._settings.clip)

    def accepts(self, gradients: Mapping[str, Tensor]) -> bool:
        """Returns True if the gradient of a client's step, or of a part of it, is small enough to be used.

        A gradient that is still to be clipped must be finite; the norm of any other must be at most `LARGEST_SHARE`.
        """
        if self.clips:
            return math.isfinite(squared_norm(gradients.values()))
        return norm(gradients.values()) <= LARGEST_SHARE

    def of(self, client: int, begins: bool) -> TrainableAdapter:
        """Returns the adapter to use for a client.

        Args:
            client: Number of the client.
            begins: True for a training step; under `copies` the client's copy is created at its first one.
        """
        if begins and self._schedule.personal and client not in self._copies:
            self._copies[client] = self._new(Start(self.shared.snapshot))
        return self._copies.get(client, self.shared)

    def _new(self, start: Start) -> TrainableAdapter:
        """Returns a new copy of the adapter."""
        return TrainableAdapter(
            start.tensors,
            self._settings,
            self._schedule.learns,
            start.task,
            start.own,
            self._device,
            self._budget,
            stage=None if self._make_stage is None else self._make_stage(),
            kept=start.kept,
        )

    def learn(
        self,
        adapter: TrainableAdapter,
        snapshot: AdapterSnapshot,
        spent: bool,
        packets: Sequence[Packet],
        gradients: Mapping[str, Tensor],
    ) -> UnclippedGradient | None:
        """Uses the gradient of a backward: makes a step now, adds the gradient to a sum, or drops a late gradient.

        A step is made at the learning rate of the client's step that the gradient belongs to. A step for several
        clients, as under `batched` and `accumulate`, is made at the mean of their rates.

        Args:
            adapter: Adapter that the gradient belongs to.
            snapshot: Snapshot of it which the forward was computed with.
            spent: True if the forward already had a backward, so that these packets are late.
            packets: Packets with the gradients that came.
            gradients: Gradients of the adapter by exported name, summed over the packets.

        Returns:
            With clipping, and once all parts of the step have come, the gradient that waits for `release`.

        Raises:
            Unusable: The step was not made, or the gradient not added to the sum.
        """
        if self._schedule.gathers:
            self._learn_together(adapter, snapshot, spent, packets, gradients)
            return None
        packet = packets[0]
        gradients = adapter.regularised(snapshot, gradients, 1 / packet.parts)
        if self.clips:
            whole = self._joined(self._unclipped, packet, snapshot, gradients)
            return None if whole is None else UnclippedGradient(adapter, whole, packet.key, packet.rate)
        if self._schedule.sums:
            self._add_to_window(adapter, packet.key, packet.rate, snapshot, gradients)
        elif packet.parts == 1:
            self._step(adapter, gradients, packet.rate, packet.key.round)
        elif (whole := self._joined(self._sums, packet, snapshot, gradients)) is not None:
            self._step(adapter, whole.gradients, packet.rate, packet.key.round)
        return None

    def _learn_together(
        self,
        adapter: TrainableAdapter,
        snapshot: AdapterSnapshot,
        spent: bool,
        packets: Sequence[Packet],
        gradients: Mapping[str, Tensor],
    ) -> None:
        """Makes one step with the mean gradient of several clients."""
        if spent:
            self._counts.late += 1
            return
        mean = {name: gradient / len(packets) for name, gradient in gradients.items()}
        regularised = adapter.regularised(snapshot, mean)
        rate = _mean([packet.rate for packet in packets])
        self._step(adapter, regularised, rate, packets[0].key.round)

    def _joined(
        self, sums: dict[int, _GradientSum], packet: Packet, snapshot: AdapterSnapshot, gradients: Mapping[str, Tensor]
    ) -> _GradientSum | None:
        """Adds a part of a client's step, and returns the sum of all parts after the last part."""
        key = packet.key
        whole = sums.get(key.client)
        if whole is None or key.turn not in whole.parts:  # a step that was given up does not join the next one
            whole = sums[key.client] = _GradientSum()
        whole.add(key, packet.rate, snapshot, gradients)
        if whole.parts[key.turn] < packet.parts:
            return None
        return sums.pop(key.client)

    def _add_to_window(
        self,
        adapter: TrainableAdapter,
        key: StepKey,
        rate: float,
        snapshot: AdapterSnapshot,
        gradients: Mapping[str, Tensor],
    ) -> None:
        """Adds a gradient to its client's sum, if the sum stays small enough to be added to the other clients' sums.

        Raises:
            Unusable: The sum would be too large; it stays as it was.
        """
        if snapshot is not adapter.snapshot:
            self._counts.late += 1
            return
        whole = self._sums.get(key.client, _GradientSum())
        if not norm(whole.sum_with(gradients).values()) <= LARGEST_SHARE:
            words = f"its gradients since the last barrier have a norm above {LARGEST_SHARE:g}"
            raise Unusable(f"{words}, too large to be summed with those of others")
        whole.add(key, rate, snapshot, gradients)
        self._sums[key.client] = whole

    def release(self, unclipped: UnclippedGradient, coefficient: float) -> None:
        """Uses a gradient that has waited for its clipping coefficient.

        Args:
            unclipped: Gradient that `learn` returned.
            coefficient: Factor in [0, 1] that it is scaled by.

        Raises:
            Unusable: The step was not made, or the gradient not added to the sum.
        """
        whole = unclipped.whole
        scaled = {name: gradient * coefficient for name, gradient in whole.gradients.items()}
        if not self._schedule.sums:
            self._step(unclipped.adapter, scaled, unclipped.rate, unclipped.key.round)
        elif len(whole.snapshots) > 1:  # a barrier was passed between its parts
            self._counts.late += 1
        else:
            self._add_to_window(unclipped.adapter, unclipped.key, unclipped.rate, whole.snapshots[0], scaled)

    def _step(self, adapter: TrainableAdapter, gradients: Mapping[str, Tensor], rate: float, round: int) -> None:
        adapter.step(gradients, rate, round)
        self._counts.steps += 1

    def close_window(self, clients: Sequence[int] | None = None) -> bool:
        """Under `accumulate`, makes one step with the sum of all gradients since the last, in the order of the clients.

        Args:
            clients: Clients whose gradients count; all clients where not given.

        Returns:
            True if a step was made. None is made where nothing was summed, nor where the adapter would not be finite
            after it; that is counted as "unusable".
        """
        chosen = sorted(self._sums if clients is None else self._sums.keys() & set(clients))
        sums = [self._sums[client] for client in chosen]
        self._sums.clear()
        if not sums:
            return False

        names = sums[0].gradients
        gradients = {name: torch.stack([one.gradients[name] for one in sums]).sum(0) for name in names}
        round = max(turn[0] for one in sums for turn in one.parts)
        rate = _mean([rate for one in sums for rate in one.rates.values()])
        try:
            self._step(self.shared, gradients, rate, round)
        except Unusable:
            self._counts.unusable += 1
            return False
        return True

    def leave(self, client: int) -> None:
        """Drops the unfinished step of a client that has ended its round, or is dead."""
        self._unclipped.pop(client, None)
        if not self._schedule.sums:
            self._sums.pop(client, None)

    def end_round(self, finished: Sequence[int]) -> None:
        """Keeps the copies, and the optimiser states, of the clients that have finished the round."""
        if self._schedule.sums:
            self.close_window(finished)
        self._copies = {client: copy for client, copy in self._copies.items() if client in finished}
        self._unclipped.clear()
        if self._settings.optimizer_state == "keep":
            for client, copy in self._copies.items():
                earlier = fitting(self._moments.get(client, {}), copy.snapshot)
                self._moments[client] = {**earlier, **copy.moments()}

    def assign(self, starts: Mapping[int, Start]) -> None:
        """Under `copies`, sets the copies that clients begin a round with; other clients begin with the shared adapter.

        A copy's optimiser starts without state, or, with `--train.optimizer-state keep`, with its state at the end of
        the client's last round that counted.

        Args:
            starts: Starts by client.
        """
        self._copies.clear()
        for client, start in starts.items():
            self.assign_again(client, start)

    def assign_again(self, client: int, start: Start) -> None:
        """Under `copies`, sets the copy of a client that begins or repeats the round.

        Args:
            client: Number of the client; its steps of an earlier attempt at the round no longer count.
            start: State in which its copy begins.
        """
        copy = self._new(start)
        if start.afresh:
            self._moments.pop(client, None)
        copy.restore(self._moments.get(client, {}))
        self._copies[client] = copy

    def copies(self, clients: Collection[int] | None = None) -> dict[int, Copy]:
        """Returns, under `copies`, the clients' copies of the adapter at the end of the round.

        A copy that should have been trained, and was not, has neither control variate nor state: a stage that has seen
        no step has nothing to say of the round.

        Args:
            clients: Clients whose copies are returned; all clients where not given.
        """
        copies = {}
        for client, copy in sorted(self._copies.items()):
            if clients is not None and client not in clients:
                continue  # its round may have ended in the middle, where a stage has no result
            steps = copy.steps if copy.learns else None
            outcome = Outcome() if steps == 0 else copy.outcome()
            copies[client] = Copy(self._named(copy.snapshot), outcome.sent, outcome.kept, steps)
        return copies

    def read(self) -> Adapters:
        """Returns the shared adapter as it is now."""
        return self._named(self.shared.snapshot)

    def _named(self, snapshot: AdapterSnapshot) -> Adapters:
        detached = {name: tensor.detach() for name, tensor in snapshot.items()}
        return Adapters(put(detached, CPU), self._layers)

    def write(self, tensors: Mapping[str, Tensor], own: Mapping[int, Mapping[str, Tensor]] | None = None) -> None:
        """Replaces the shared adapter and all copies; pending batches keep the snapshot they were computed with.

        Args:
            tensors: Shared adapter by exported name.
            own: Personal adapters by client, for the evaluation of these clients.
        """
        self.shared.write(tensors)
        self.assign({client: Start(dict(personal)) for client, personal in (own or {}).items()})

    def moments(self) -> dict[str, Tensor]:
        """Returns the optimiser states: the shared adapter's by parameter, the copies' after a prefix "client/"."""
        copies = {
            f"{client}/{name}": value for client, moments in self._moments.items() for name, value in moments.items()
        }
        return self.shared.moments() | copies

    def restore(self, tensors: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Sets the shared adapter and all optimiser states to what `read` and `moments` returned earlier."""
        self.shared.write(tensors)
        self.shared.restore({name: value for name, value in moments.items() if "/" not in name})
        self._moments.clear()
        for name, value in moments.items():
            client, slash, inner = name.partition("/")
            if slash:
                self._moments.setdefault(int(client), {})[inner] = value


def _mean(rates: Sequence[float]) -> float:
    return sum(rates) / len(rates)
