"""The trunk's adapters that learn: one for all or a copy for each client, and when a gradient makes a step."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedsplit.adaptation.rank_budget import RankBudget
from fedsplit.config import TrainSettings
from fedsplit.model.devices import CPU, put
from fedsplit.optimization.bounds import LARGEST_SHARE, norm
from fedsplit.optimization.clipping import coefficient, squared_norm
from fedsplit.optimization.optim import fitting
from fedsplit.stages import StageMaker
from fedsplit.trunk.learner import Learner, Unusable, Version
from fedsplit.trunk.schedules import Schedule
from fedsplit.updates import Adapters, Task
from fedsplit.wire.packets import Packet, StepKey


@dataclass(frozen=True)
class Start:
    """What a client's copy of the trunk's adapter begins a round with.

    Attributes:
        tensors: The adapter by exported name; clients may differ in rank.
        task: What the strategy asks of training.
        own: The client's control variate for these tensors.
        afresh: The adapter is not what came of earlier rounds: what an optimiser remembers of those is of no use.
        kept: State of the strategy's own gradient stage for this copy, of the client's last round.
    """

    tensors: Mapping[str, Tensor]
    task: Task = field(default_factory=Task)
    own: Mapping[str, Tensor] = field(default_factory=dict)
    afresh: bool = False
    kept: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Copy:
    """What a client's copy has become.

    Attributes:
        adapters: After the client's last step.
        control: What the client's control variate has changed by.
        kept: State that the strategy's own gradient stage keeps of the round.
    """

    adapters: Adapters
    control: Mapping[str, Tensor]
    kept: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class _GradientSum:
    """Gradients of a client on their way to a step of the optimiser, of which of its steps, and at which rates."""

    steps: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    rates: dict[tuple[int, int, int], float] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    versions: list[Version] = field(default_factory=list)

    def add(self, key: StepKey, rate: float, version: Version, gradients: Mapping[str, Tensor]) -> None:
        """Adds those of one step or a part of it."""
        self.steps[key.turn] += 1
        self.rates[key.turn] = rate
        if not any(version is known for known in self.versions):
            self.versions.append(version)
        self.gradients = self.sum_with(gradients)

    def sum_with(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns what the sum would be with other gradients added, by exported name."""
        known = self.gradients
        added = {name: known[name] + gradient if name in known else gradient for name, gradient in gradients.items()}
        return {**known, **added}


@dataclass(frozen=True)
class Withheld:
    """The gradient of a client's step, until the client has told what it is to be scaled by.

    Attributes:
        learner: Whose adapter it is by.
        whole: The sum over the step's parts.
        key: The step.
        rate: At which share of the learning rate it is made.
    """

    learner: Learner
    whole: _GradientSum
    key: StepKey
    rate: float

    @functools.cached_property
    def squared(self) -> float:
        """The squared norm over the trunk's adapter, in float64."""
        return squared_norm(self.whole.gradients.values())


class Learners:
    """Who learns from which step, by the schedule.

    Attributes:
        shared: The adapter of all clients; under `copies` what new copies start from.
    """

    def __init__(
        self,
        start: Adapters,
        schedule: Schedule,
        settings: TrainSettings,
        counts: Counter[str],
        device: torch.device = CPU,
        budget: RankBudget | None = None,
        stage: StageMaker | None = None,
    ) -> None:
        """Nobody has a copy yet.

        Args:
            start: The trunk's adapter.
            schedule: How clients share it.
            settings: The optimiser's.
            counts: Where "steps" and "late" are counted.
            device: What the trunk computes on.
            budget: Of the trunk's ranks, where they are dealt out.
            stage: Makes the strategy's own gradient stage for a copy; None where the strategy has none.
        """
        self._device, self._budget, self._make_stage = device, budget, stage
        self._layers, self._schedule, self._settings, self._counts = start.layers, schedule, settings, counts
        self.shared = Learner(start.tensors, settings, schedule.learns, device=device, budget=budget)
        self._copies: dict[int, Learner] = {}
        self._sums: dict[int, _GradientSum] = {}
        self._unclipped: dict[int, _GradientSum] = {}
        self._kept: dict[int, dict[str, Tensor]] = {}

    @property
    def clips(self) -> bool:
        """Whether a step's gradient waits for what it is to be scaled by."""
        return self._settings.clip > 0

    def largest_coefficient(self, withheld: Withheld) -> float:
        """Returns the most that a withheld gradient may be scaled by.

        The norm over all parts is at least that over the trunk's, so that scaled by a client that tells the truth the
        trunk's is within the limit, too.
        """
        return coefficient(withheld.squared, self._settings.clip)

    def takes(self, gradients: Mapping[str, Tensor]) -> bool:
        """Returns whether the gradient of a client's step, or of a part of it, can be taken.

        One that is still to be clipped must be finite; of any other the norm must be `LARGEST_SHARE` at most.
        """
        if self.clips:
            return math.isfinite(squared_norm(gradients.values()))
        return norm(gradients.values()) <= LARGEST_SHARE

    def of(self, client: int, begins: bool) -> Learner:
        """Whose adapter a client's step is computed with; with its first training step its copy begins."""
        if begins and self._schedule.personal and client not in self._copies:
            self._copies[client] = Learner(
                self.shared.version, self._settings, self._schedule.learns, device=self._device, budget=self._budget
            )
        return self._copies.get(client, self.shared)

    def learn(
        self,
        learner: Learner,
        version: Version,
        spent: bool,
        packets: Sequence[Packet],
        gradients: Mapping[str, Tensor],
    ) -> Withheld | None:
        """Takes the gradient of one backward: into a step now, into a sum, or not at all.

        A step is made at the rate of the client's step that its gradient is of. Where it is of several, as under
        `batched` and `accumulate`, it is made at their mean rate.

        Args:
            learner: Whose adapter it is by.
            version: Which version of it.
            spent: The forward had a backward before: these packets are late.
            packets: The gradients that came.
            gradients: Of the adapter, by exported name, summed over the packets.

        Returns:
            With clipping, the gradient of a step that has come to its end, for `release`.

        Raises:
            Unusable: The step was not made, or the gradient not added to the others.
        """
        if self._schedule.gathers:
            if spent:
                self._counts["late"] += 1
                return None
            mean = {name: gradient / len(packets) for name, gradient in gradients.items()}
            whole_step = learner.regularised(version, mean)
            self._step(learner, whole_step, _mean([packet.rate for packet in packets]), packets[0].key.round)
            return None
        packet = packets[0]
        gradients = learner.regularised(version, gradients, 1 / packet.parts)
        if self.clips:
            whole = self._joined(self._unclipped, packet, version, gradients)
            return None if whole is None else Withheld(learner, whole, packet.key, packet.rate)
        if self._schedule.sums:
            self._add_to_window(learner, packet.key, packet.rate, version, gradients)
        elif packet.parts == 1:
            self._step(learner, gradients, packet.rate, packet.key.round)
        elif (whole := self._joined(self._sums, packet, version, gradients)) is not None:
            self._step(learner, whole.gradients, packet.rate, packet.key.round)
        return None

    def _joined(
        self, sums: dict[int, _GradientSum], packet: Packet, version: Version, gradients: Mapping[str, Tensor]
    ) -> _GradientSum | None:
        """Adds a part of a client's step to the others; their sum, once all are there."""
        key = packet.key
        whole = sums.get(key.client)
        if whole is None or key.turn not in whole.steps:  # one that was given up does not join the next
            whole = sums[key.client] = _GradientSum()
        whole.add(key, packet.rate, version, gradients)
        if whole.steps[key.turn] < packet.parts:
            return None
        return sums.pop(key.client)

    def _add_to_window(
        self, learner: Learner, key: StepKey, rate: float, version: Version, gradients: Mapping[str, Tensor]
    ) -> None:
        """Adds a gradient to its client's sum, if that stays small enough to be added to those of others.

        Raises:
            Unusable: It does not; the sum is as it was.
        """
        if version is not learner.version:
            self._counts["late"] += 1
            return
        whole = self._sums.get(key.client, _GradientSum())
        if not norm(whole.sum_with(gradients).values()) <= LARGEST_SHARE:
            words = f"its gradients since the last barrier have a norm above {LARGEST_SHARE:g}"
            raise Unusable(f"{words}, too large to be summed with those of others")
        whole.add(key, rate, version, gradients)
        self._sums[key.client] = whole

    def release(self, withheld: Withheld, coefficient: float) -> None:
        """Goes on with a gradient that was withheld.

        Args:
            withheld: What `learn` returned.
            coefficient: What it is scaled by, in [0, 1].

        Raises:
            Unusable: The step was not made, or the gradient not added to the others.
        """
        scaled = {name: gradient * coefficient for name, gradient in withheld.whole.gradients.items()}
        if not self._schedule.sums:
            self._step(withheld.learner, scaled, withheld.rate, withheld.key.round)
        elif len(withheld.whole.versions) > 1:  # a barrier was passed between its parts
            self._counts["late"] += 1
        else:
            version = withheld.whole.versions[0]
            self._add_to_window(withheld.learner, withheld.key, withheld.rate, version, scaled)

    def _step(self, learner: Learner, gradients: Mapping[str, Tensor], rate: float, round: int) -> None:
        learner.step(gradients, rate, round)
        self._counts["steps"] += 1

    def close_window(self, clients: Sequence[int] | None = None) -> bool:
        """Under `accumulate`: one step with the sum of the gradients since the last, in the order of the clients.

        Args:
            clients: Whose gradients count; everybody's where not given.

        Returns:
            Whether a step was made. None is where nothing was summed, or where the adapter would not be finite after
            it, which is counted as "unusable".
        """
        chosen = sorted(self._sums if clients is None else self._sums.keys() & set(clients))
        sums = [self._sums[client] for client in chosen]
        self._sums.clear()
        if not sums:
            return False
        gradients = {name: torch.stack([s.gradients[name] for s in sums]).sum(0) for name in sums[0].gradients}
        round = max(turn[0] for s in sums for turn in s.steps)
        rate = _mean([rate for s in sums for rate in s.rates.values()])
        try:
            self._step(self.shared, gradients, rate, round)
        except Unusable:
            self._counts["unusable"] += 1
            return False
        return True

    def leave(self, client: int) -> None:
        """A client has ended its round, or is dead: a step that it has not finished does not count."""
        self._unclipped.pop(client, None)
        if not self._schedule.sums:
            self._sums.pop(client, None)

    def end_round(self, finished: Sequence[int]) -> None:
        """Keeps, of the clients, what those have done that have finished the round."""
        if self._schedule.sums:
            self.close_window(finished)
        self._copies = {client: copy for client, copy in self._copies.items() if client in finished}
        self._unclipped.clear()
        if self._settings.optimizer_state == "keep":
            for client, copy in self._copies.items():
                self._kept[client] = {**fitting(self._kept.get(client, {}), copy.version), **copy.moments()}

    def assign(self, starts: Mapping[int, Start]) -> None:
        """Under `copies`: what each client's copy begins the round with; a client not named begins with the trunk's.

        Its optimiser begins anew, or where its state is kept goes on from its client's last round that counted.

        Args:
            starts: By client.
        """
        self._copies = {
            client: Learner(
                start.tensors,
                self._settings,
                self._schedule.learns,
                start.task,
                start.own,
                self._device,
                self._budget,
                None if self._make_stage is None else self._make_stage(),
                start.kept,
            )
            for client, start in starts.items()
        }
        for client, copy in self._copies.items():
            if starts[client].afresh:
                self._kept.pop(client, None)
            copy.restore(self._kept.get(client, {}))

    def copies(self) -> dict[int, Copy]:
        """Under `copies`: each client's adapter of the round that has ended."""
        outcomes = {client: learner.outcome() for client, learner in sorted(self._copies.items())}
        return {
            client: Copy(self._named(self._copies[client].version), outcome.sent, outcome.kept)
            for client, outcome in outcomes.items()
        }

    def read(self) -> Adapters:
        """The shared adapter as it is now."""
        return self._named(self.shared.version)

    def _named(self, version: Version) -> Adapters:
        return Adapters(put({name: tensor.detach() for name, tensor in version.items()}, CPU), self._layers)

    def write(self, tensors: Mapping[str, Tensor], own: Mapping[int, Mapping[str, Tensor]] | None = None) -> None:
        """Replaces the shared adapter, and ends all copies; pending forwards keep the version they had.

        Args:
            tensors: By exported name.
            own: Adapters that clients have for themselves, by client; what they evaluate is computed with them.
        """
        self.shared.write(tensors)
        self.assign({client: Start(dict(personal)) for client, personal in (own or {}).items()})

    def moments(self) -> dict[str, Tensor]:
        """What the shared adapter's optimiser remembers, as `Learner.moments` has it; and copies', after "client/"."""
        kept = {f"{client}/{name}": value for client, own in self._kept.items() for name, value in own.items()}
        return self.shared.moments() | kept

    def restore(self, tensors: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Goes on from what `read` and `moments` told in another life."""
        self.shared.write(tensors)
        self.shared.restore({name: value for name, value in moments.items() if "/" not in name})
        self._kept.clear()
        for name, value in moments.items():
            client, slash, own = name.partition("/")
            if slash:
                self._kept.setdefault(int(client), {})[own] = value


def _mean(rates: Sequence[float]) -> float:
    return sum(rates) / len(rates)
