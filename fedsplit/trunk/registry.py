"""The trunk's trainable adapters, and the steps made from gradients.

Clients share one adapter, or each client has a copy (`fedsplit.trunk.copies`). Gradients that wait are in sums
(`fedsplit.trunk.gradients`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from fedsplit.adaptation.rank_budget import RankBudget
from fedsplit.model.devices import CPU
from fedsplit.optimization.bounds import LARGEST_SHARE, norm
from fedsplit.optimization.clipping import coefficient, squared_norm
from fedsplit.settings.sections import TrainSettings
from fedsplit.stages import StageMaker
from fedsplit.trunk.copies import ClientCopies, Copy, Start, exported
from fedsplit.trunk.gradients import GradientSum, UnclippedGradient
from fedsplit.trunk.schedules import Schedule
from fedsplit.trunk.status import RoundCounts
from fedsplit.trunk.step_sync import Join, Master, Mirror
from fedsplit.trunk.trainable import AdapterSnapshot, TrainableAdapter, Unusable
from fedsplit.updates import Adapters
from fedsplit.wire.packets import Packet, StepKey


class AdapterRegistry:
    """Holds the trunk's adapters, and turns gradients into steps of the optimisers, by the schedule.

    Attributes:
        shared: Adapter of all clients. Under `copies`, the start of every new copy.
        master: Adapter of all replicas, if the replicas learn as one trunk and this is the first; else None.
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
        join: Join | None = None,
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
            join: Returns the replica's way to the adapter of all replicas, and that adapter where it lives here. None
                for a trunk without replicas, or whose replicas train their own adapters.
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
        self.master: Master | None = None
        self._mirror: Mirror | None = None
        if join is not None:
            make = functools.partial(TrainableAdapter, start.tensors, settings, True, device=device)
            peers, self.master = join(make)
            self._mirror = Mirror(peers, self.shared, counts)
        self._copies = ClientCopies(self._new, start.layers, keeps_moments=settings.optimizer_state == "keep")
        self._sums: dict[int, GradientSum] = {}
        self._unclipped: dict[int, GradientSum] = {}

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
        if begins and self._mirror is not None:
            # Other replicas may have made steps since the last refresh.
            self._mirror.refresh()
        copy = self._copies.get(client)
        if copy is None and begins and self._schedule.personal:
            copy = self._copies.add(client, Start(self.shared.snapshot))
        return self.shared if copy is None else copy

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
        # Each part of a step brings its share of the regularisation, so that the sum of all parts has it once.
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
        rates = [packet.rate for packet in packets]
        round = packets[0].key.round
        if self._mirror is not None:
            self._counts.late += not self._mirror.step(gradients, len(packets), rates, round)
            return
        mean = {name: gradient / len(packets) for name, gradient in gradients.items()}
        regularised = adapter.regularised(snapshot, mean)
        self._step(adapter, regularised, _mean(rates), round)

    def _joined(
        self,
        sums: dict[int, GradientSum],
        packet: Packet,
        snapshot: AdapterSnapshot,
        gradients: Mapping[str, Tensor],
    ) -> GradientSum | None:
        """Adds a part of a client's step, and returns the sum of all parts after the last part."""
        key = packet.key
        whole = sums.get(key.client)
        if whole is None or key.turn not in whole.parts:
            # A sum of an earlier turn belongs to a step that the client gave up, and must not join this step.
            whole = sums[key.client] = GradientSum()
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
        whole = self._sums.get(key.client, GradientSum())
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

    def _step(
        self,
        adapter: TrainableAdapter,
        gradients: Mapping[str, Tensor],
        rate: float,
        round: int,
    ) -> None:
        adapter.step(gradients, rate, round)
        self._counts.steps += 1

    def attend(self, is_attended: bool) -> None:
        """Takes note whether clients train. Other replicas wait only for a replica with clients that train."""
        if self._mirror is not None:
            self._mirror.attend(is_attended)

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
        # At the end of a round a replica without gradients must close, too: the other replicas wait for it.
        if not sums and (self._mirror is None or clients is None):
            return False

        gradients = {}
        for name in sums[0].gradients if sums else ():
            of_clients = [client.gradients[name] for client in sums]
            gradients[name] = torch.stack(of_clients).sum(0)
        round = max((turn[0] for client in sums for turn in client.parts), default=0)
        rates = [rate for client in sums for rate in client.rates.values()]
        try:
            if self._mirror is not None:
                self._mirror.step(gradients, 0, rates, round, is_last=clients is not None)  # 0: the sum, no mean
            else:
                self._step(self.shared, gradients, _mean(rates), round)
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
        if self._mirror is not None:
            # Between rounds the adapter is read from one replica, so that all must have the same.
            self._mirror.refresh()
        self._copies.end_round(finished)
        self._unclipped.clear()

    def assign(self, starts: Mapping[int, Start]) -> None:
        """Under `copies`, sets the copies of clients for the beginning of a round.

        The optimiser of a copy starts without state. With `--train.optimizer-state keep`, the optimiser starts with
        the state at the end of the client's last round that counted.

        Args:
            starts: Starts by client. A client without a start begins with the shared adapter.
        """
        self._copies.assign_all(starts)

    def assign_again(self, client: int, start: Start) -> None:
        """Under `copies`, sets the copy of a client that begins or repeats the round; see `ClientCopies.assign`."""
        self._copies.assign(client, start)

    def copies(self, clients: Collection[int] | None = None) -> dict[int, Copy]:
        """Returns, under `copies`, the clients' copies of the adapter at the end of the round.

        Args:
            clients: Clients with a finished round; all clients where not given.
        """
        return self._copies.read(clients)

    def read(self) -> Adapters:
        """Returns the newest snapshot of the shared adapter, on the CPU."""
        return exported(self.shared.snapshot, self._layers)

    def write(self, tensors: Mapping[str, Tensor], own: Mapping[int, Mapping[str, Tensor]] | None = None) -> None:
        """Replaces the shared adapter and all copies. Pending batches keep the snapshot of the forward.

        Args:
            tensors: Shared adapter by exported name.
            own: Personal adapters by client, for evaluations by these clients.
        """
        self.shared.write(tensors)
        if self.master is not None:
            self.master.write(tensors)
        starts = {}
        for client, adapter in (own or {}).items():
            starts[client] = Start(dict(adapter))
        self.assign(starts)

    def moments(self) -> dict[str, Tensor]:
        """Returns the optimiser states: of the shared adapter by parameter, of the copies after a prefix "client/"."""
        of_copies = self._copies.moments()
        if self.master is not None:
            return {**self.master.moments(), **of_copies}
        if self._mirror is not None:  # the first replica has the optimiser of all replicas
            return of_copies
        return {**self.shared.moments(), **of_copies}

    def restore(self, tensors: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Sets the shared adapter and all optimiser states to earlier results of `read` and `moments`."""
        of_shared = {}
        of_copies = {}
        for name, value in moments.items():
            if "/" in name:
                of_copies[name] = value
            else:
                of_shared[name] = value
        self._copies.restore(of_copies)
        self.shared.write(tensors)
        self.shared.restore(of_shared)
        if self.master is not None:
            self.master.write(tensors, of_shared)


def _mean(rates: Sequence[float]) -> float:
    return sum(rates) / len(rates)
