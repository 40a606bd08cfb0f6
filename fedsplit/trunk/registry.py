"""The trunk's trainable adapters: a shared adapter or a copy for each client, and the steps made from gradients."""

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
    """State of a client's copy of the trunk's adapter at the beginning of a round.

    Attributes:
        tensors: Adapter by exported name. Clients may differ in rank.
        task: Instructions of the strategy.
        own: Control variate of the client for the tensors.
        afresh: True if the adapter does not continue the client's last adapter. The optimiser's state of earlier rounds
            then does not fit, and is dropped.
        kept: State of the strategy's gradient stage for the copy, from the client's last round.
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
        kept: State of the strategy's gradient stage after the round.
        steps: Number of steps of the optimiser; None for a copy without a tensor that learns.
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
        snapshots: Snapshots of the forwards that the gradients belong to.
    """

    parts: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    rates: dict[tuple[int, int, int], float] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    snapshots: list[AdapterSnapshot] = field(default_factory=list)

    def add(self, key: StepKey, rate: float, snapshot: AdapterSnapshot, gradients: Mapping[str, Tensor]) -> None:
        """Adds the gradient of one step, or of a part of a step."""
        self.parts[key.turn] += 1
        self.rates[key.turn] = rate
        if not any(snapshot is known for known in self.snapshots):  # by identity: equality would compare tensors
            self.snapshots.append(snapshot)
        self.gradients = self.sum_with(gradients)

    def sum_with(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns a new sum by exported name, with further gradients added."""
        total = dict(self.gradients)
        for name, gradient in gradients.items():
            total[name] = total[name] + gradient if name in total else gradient
        return total


@dataclass(frozen=True)
class UnclippedGradient:
    """Gradient of a client's step that waits for its clipping coefficient.

    Attributes:
        adapter: Adapter to train.
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
    """Holds the trunk's adapters, and turns gradients into steps of the optimisers, by the schedule.

    Attributes:
        shared: Adapter of all clients. Under `copies`, the start of every new copy.
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
            schedule: Rule by which clients share the adapter.
            settings: Settings of the optimisers.
            counts: Counts of the round. The registry counts "steps", "late" and "unusable".
            device: Device of the trunk.
            budget: Budget of the trunk's ranks; None for fixed ranks.
            stage: Maker of the strategy's gradient stage for a copy; None for a strategy without a stage.
        """
        self._layers = start.layers
        self._schedule = schedule
        self._settings = settings
        self._counts = counts
        self._device = device
        self._budget = budget
        self._make_stage = stage
        self.shared = TrainableAdapter(
            start.tensors,
            settings,
            learns=schedule.learns,
            device=device,
            budget=budget,
        )
        self._copies: dict[int, TrainableAdapter] = {}
        self._sums: dict[int, _GradientSum] = {}
        self._unclipped: dict[int, _GradientSum] = {}
        self._moments: dict[int, dict[str, Tensor]] = {}

    @property
    def clips(self) -> bool:
        """True if the gradient of a step waits for a clipping coefficient."""
        return self._settings.clip > 0

    def largest_coefficient(self, unclipped: UnclippedGradient) -> float:
        """Returns the largest coefficient that an honest client can send for a gradient.

        The norm over all parts of the model is at least the norm over the trunk's adapter. The honest coefficient is
        therefore at most the coefficient that the trunk's norm alone would give.
        """
        return coefficient(unclipped.squared, self._settings.clip)

    def accepts(self, gradients: Mapping[str, Tensor]) -> bool:
        """Returns True if the gradient of a client's step, or of a part of a step, is small enough to be used.

        With clipping, the gradient must be finite. Without, the norm must be at most `LARGEST_SHARE`.
        """
        if self.clips:
            return math.isfinite(squared_norm(gradients.values()))
        return norm(gradients.values()) <= LARGEST_SHARE

    def of(self, client: int, begins: bool) -> TrainableAdapter:
        """Returns the adapter to use for a client.

        Args:
            client: Number of the client.
            begins: True for a training step. Under `copies`, the client's first training step creates the copy.
        """
        if begins and self._schedule.personal and client not in self._copies:
            self._copies[client] = self._new(Start(self.shared.snapshot))
        return self._copies.get(client, self.shared)

    def _new(self, start: Start) -> TrainableAdapter:
        """Returns a new copy of the adapter."""
        return TrainableAdapter(
            start.tensors,
            self._settings,
            learns=self._schedule.learns,
            task=start.task,
            own=start.own,
            device=self._device,
            budget=self._budget,
            stage=None if self._make_stage is None else self._make_stage(),  # a stage serves one client and one round
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

        The optimiser's step has the learning rate of the client's step. A step for several clients, as under `batched`
        and `accumulate`, has the mean of the clients' rates.

        Args:
            adapter: Adapter to train.
            snapshot: Snapshot of the adapter at the forward.
            spent: True if the forward already had a backward. The packets are then late.
            packets: Packets with the gradients.
            gradients: Gradients of the adapter by exported name, summed over the packets.

        Returns:
            The gradient that waits for `release`, after the last part of a step with clipping; otherwise None.

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
            return None
        if packet.parts == 1:
            self._step(adapter, gradients, packet.rate, packet.key.round)
            return None
        whole = self._joined(self._sums, packet, snapshot, gradients)
        if whole is not None:
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
        if spent:  # the step with the batch's mean gradient has been made without these clients
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
        if whole is None or key.turn not in whole.parts:
            # A sum of an earlier turn belongs to a step that the client gave up, and must not join this step.
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
        """Adds a gradient to the client's sum, if the sum stays small enough to be added to the sums of all clients.

        Raises:
            Unusable: The sum would be too large. The sum stays unchanged.
        """
        if snapshot is not adapter.snapshot:  # the barrier has passed, and the step with this snapshot is made
            self._counts.late += 1
            return
        whole = self._sums.get(key.client, _GradientSum())
        size = norm(whole.sum_with(gradients).values())
        if not size <= LARGEST_SHARE:  # not `>`, since NaN must be refused, too
            words = f"its gradients since the last barrier have a norm above {LARGEST_SHARE:g}"
            raise Unusable(f"{words}, too large to be summed with those of others")
        whole.add(key, rate, snapshot, gradients)
        self._sums[key.client] = whole

    def release(self, unclipped: UnclippedGradient, coefficient: float) -> None:
        """Uses a gradient that has waited for the clipping coefficient.

        Args:
            unclipped: Result of `learn`.
            coefficient: Factor in [0, 1] for the gradient.

        Raises:
            Unusable: The step was not made, or the gradient not added to the sum.
        """
        whole = unclipped.whole
        scaled = {name: gradient * coefficient for name, gradient in whole.gradients.items()}
        if not self._schedule.sums:
            self._step(unclipped.adapter, scaled, unclipped.rate, unclipped.key.round)
        elif len(whole.snapshots) > 1:  # a barrier was passed between two parts of the step
            self._counts.late += 1
        else:
            self._add_to_window(
                unclipped.adapter,
                unclipped.key,
                rate=unclipped.rate,
                snapshot=whole.snapshots[0],
                gradients=scaled,
            )

    def _step(self, adapter: TrainableAdapter, gradients: Mapping[str, Tensor], rate: float, round: int) -> None:
        adapter.step(gradients, rate, round)
        self._counts.steps += 1

    def close_window(self, clients: Sequence[int] | None = None) -> bool:
        """Under `accumulate`, makes one step with the sum of all gradients since the last barrier.

        Args:
            clients: Clients with gradients that count; all clients where not given.

        Returns:
            True if a step was made. No step is made if nothing was summed. A step after which the adapter would not be
            finite is not made, and counted as "unusable".
        """
        # Sorted, since a sum of floating-point numbers depends on the order.
        chosen = self._sums.keys() if clients is None else self._sums.keys() & set(clients)
        sums = [self._sums[client] for client in sorted(chosen)]
        self._sums.clear()
        if not sums:
            return False

        gradients = {}
        for name in sums[0].gradients:
            of_clients = [client.gradients[name] for client in sums]
            gradients[name] = torch.stack(of_clients).sum(0)
        round = max(turn[0] for client in sums for turn in client.parts)
        rate = _mean([rate for client in sums for rate in client.rates.values()])
        try:
            self._step(self.shared, gradients, rate, round)
        except Unusable:
            self._counts.unusable += 1
            return False
        return True

    def leave(self, client: int) -> None:
        """Drops the unfinished step of a client that has left the round, or is dead."""
        self._unclipped.pop(client, None)
        if not self._schedule.sums:  # under `accumulate`, the client's finished steps count at the barrier
            self._sums.pop(client, None)

    def end_round(self, finished: Sequence[int]) -> None:
        """Keeps the copies and the optimiser states of the clients in `finished`, and drops all further copies."""
        if self._schedule.sums:
            self.close_window(finished)  # gradients of a client that dropped out do not count
        for client in self._copies.keys() - set(finished):
            del self._copies[client]
        self._unclipped.clear()
        if self._settings.optimizer_state == "keep":
            for client, copy in self._copies.items():
                earlier = fitting(self._moments.get(client, {}), copy.snapshot)
                self._moments[client] = {**earlier, **copy.moments()}

    def assign(self, starts: Mapping[int, Start]) -> None:
        """Under `copies`, sets the copies of clients for the beginning of a round.

        The optimiser of a copy starts without state. With `--train.optimizer-state keep`, the optimiser starts with
        the state at the end of the client's last round that counted.

        Args:
            starts: Starts by client. A client without a start begins with the shared adapter.
        """
        self._copies.clear()
        for client, start in starts.items():
            self.assign_again(client, start)

    def assign_again(self, client: int, start: Start) -> None:
        """Under `copies`, sets the copy of a client that begins or repeats the round.

        Args:
            client: Number of the client. Steps of an earlier attempt at the round no longer count.
            start: State of the copy at the beginning.
        """
        copy = self._new(start)
        if start.afresh:  # moments are averages over gradients of the former factors
            self._moments.pop(client, None)
        copy.restore(self._moments.get(client, {}))
        self._copies[client] = copy

    def copies(self, clients: Collection[int] | None = None) -> dict[int, Copy]:
        """Returns, under `copies`, the clients' copies of the adapter at the end of the round.

        A copy that learns, but made no step, has neither control variate nor state of a stage.

        Args:
            clients: Clients with a finished round; all clients where not given.
        """
        copies = {}
        for client, copy in sorted(self._copies.items()):
            if clients is not None and client not in clients:
                continue  # an unfinished round may have ended in the middle, where a stage has no result
            steps = copy.steps if copy.learns else None
            outcome = Outcome() if steps == 0 else copy.outcome()  # without steps, a stage knows nothing of the round
            adapters = self._named(copy.snapshot)
            copies[client] = Copy(adapters, control=outcome.sent, kept=outcome.kept, steps=steps)
        return copies

    def read(self) -> Adapters:
        """Returns the newest snapshot of the shared adapter, on the CPU."""
        return self._named(self.shared.snapshot)

    def _named(self, snapshot: AdapterSnapshot) -> Adapters:
        detached = {name: tensor.detach() for name, tensor in snapshot.items()}
        return Adapters(put(detached, CPU), self._layers)

    def write(self, tensors: Mapping[str, Tensor], own: Mapping[int, Mapping[str, Tensor]] | None = None) -> None:
        """Replaces the shared adapter and all copies. Pending batches keep the snapshot of the forward.

        Args:
            tensors: Shared adapter by exported name.
            own: Personal adapters by client, for evaluations by these clients.
        """
        self.shared.write(tensors)
        starts = {}
        for client, adapter in (own or {}).items():
            starts[client] = Start(dict(adapter))
        self.assign(starts)

    def moments(self) -> dict[str, Tensor]:
        """Returns the optimiser states: of the shared adapter by parameter, of the copies after a prefix "client/"."""
        all_moments = self.shared.moments()
        for client, moments in self._moments.items():
            for name, value in moments.items():
                all_moments[f"{client}/{name}"] = value
        return all_moments

    def restore(self, tensors: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Sets the shared adapter and all optimiser states to earlier results of `read` and `moments`."""
        of_shared = {}
        self._moments.clear()
        for name, value in moments.items():
            client, slash, inner = name.partition("/")
            if slash:
                self._moments.setdefault(int(client), {})[inner] = value
            else:
                of_shared[name] = value
        self.shared.write(tensors)
        self.shared.restore(of_shared)


def _mean(rates: Sequence[float]) -> float:
    return sum(rates) / len(rates)
