"""The trunk's adapters that learn: one for all or a copy for each client, and when a gradient makes a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedsplit.config import TrainSettings
from fedsplit.devices import CPU, put
from fedsplit.learner import Learner, Version
from fedsplit.packets import Packet, StepKey
from fedsplit.schedules import Schedule
from fedsplit.updates import Adapters, Task


@dataclass(frozen=True)
class Start:
    """What a client's copy of the trunk's adapter begins a round with.

    Attributes:
        tensors: The adapter by exported name; clients may differ in rank.
        task: What the strategy asks of training.
        own: The client's control variate for these tensors.
    """

    tensors: Mapping[str, Tensor]
    task: Task = field(default_factory=Task)
    own: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Copy:
    """What a client's copy has become.

    Attributes:
        adapters: After the client's last step.
        control: What the client's control variate has changed by.
    """

    adapters: Adapters
    control: Mapping[str, Tensor]


@dataclass
class _GradientSum:
    """Gradients of a client on their way to a step of the optimiser, and of which of its steps."""

    steps: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def add(self, key: StepKey, gradients: Mapping[str, Tensor]) -> None:
        """Adds those of one step or micro-batch."""
        self.steps[key.place] += 1
        for name, gradient in gradients.items():
            self.gradients[name] = self.gradients[name] + gradient if name in self.gradients else gradient


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
    ) -> None:
        """Nobody has a copy yet.

        Args:
            start: The trunk's adapter.
            schedule: How clients share it.
            settings: The optimiser's.
            counts: Where "steps" and "late" are counted.
            device: What the trunk computes on.
        """
        self._device = device
        self._layers, self._schedule, self._settings, self._counts = start.layers, schedule, settings, counts
        self.shared = Learner(start.tensors, settings, schedule.learns, device=device)
        self._copies: dict[int, Learner] = {}
        self._sums: dict[int, _GradientSum] = {}

    def of(self, client: int, begins: bool) -> Learner:
        """Whose adapter a client's step is computed with; with its first training step its copy begins."""
        if begins and self._schedule.personal and client not in self._copies:
            self._copies[client] = Learner(
                self.shared.version, self._settings, self._schedule.learns, device=self._device
            )
        return self._copies.get(client, self.shared)

    def learn(
        self,
        learner: Learner,
        version: Version,
        spent: bool,
        packets: Sequence[Packet],
        gradients: Mapping[str, Tensor],
    ) -> None:
        """Takes the gradient of one backward: into a step now, into a sum, or not at all.

        Args:
            learner: Whose adapter it is by.
            version: Which version of it.
            spent: The forward had a backward before: these packets are late.
            packets: The gradients that came.
            gradients: Of the adapter, by exported name, summed over the packets.
        """
        key = packets[0].key
        if self._schedule.gathers:
            if spent:
                self._counts["late"] += 1
                return
            self._step(learner, {name: gradient / len(packets) for name, gradient in gradients.items()})
            return
        if self._schedule.sums and version is not learner.version:
            self._counts["late"] += 1
            return
        if not self._schedule.sums and packets[0].micros == 1:
            self._step(learner, gradients)
            return
        total = self._sums.get(key.client)
        if total is None or (not self._schedule.sums and key.place not in total.steps):
            total = self._sums[key.client] = _GradientSum()
        total.add(key, gradients)
        if not self._schedule.sums and total.steps[key.place] == packets[0].micros:
            del self._sums[key.client]
            self._step(learner, total.gradients)

    def _step(self, learner: Learner, gradients: Mapping[str, Tensor]) -> None:
        learner.step(gradients)
        self._counts["steps"] += 1

    def close_window(self, clients: Sequence[int] | None = None) -> bool:
        """Under `accumulate`: one step with the sum of the gradients since the last, in the order of the clients.

        Args:
            clients: Whose gradients count; everybody's where not given.

        Returns:
            Whether there was anything to sum.
        """
        chosen = sorted(self._sums if clients is None else self._sums.keys() & set(clients))
        sums = [self._sums[client].gradients for client in chosen]
        self._sums.clear()
        if not sums:
            return False
        self._step(self.shared, {name: torch.stack([s[name] for s in sums]).sum(0) for name in sums[0]})
        return True

    def leave(self, client: int) -> None:
        """A client has ended its round, or is dead: a step that it has not finished does not count."""
        if not self._schedule.sums:
            self._sums.pop(client, None)

    def end_round(self, finished: Sequence[int]) -> None:
        """Keeps, of the clients, what those have done that have finished the round."""
        if self._schedule.sums:
            self.close_window(finished)
        self._copies = {client: copy for client, copy in self._copies.items() if client in finished}

    def assign(self, starts: Mapping[int, Start]) -> None:
        """Under `copies`: what each client's copy begins the round with; a client not named begins with the trunk's.

        Args:
            starts: By client.
        """
        self._copies = {
            client: Learner(start.tensors, self._settings, self._schedule.learns, start.task, start.own, self._device)
            for client, start in starts.items()
        }

    def copies(self) -> dict[int, Copy]:
        """Under `copies`: each client's adapter of the round that has ended."""
        return {
            client: Copy(self._named(learner.version), learner.control_change())
            for client, learner in sorted(self._copies.items())
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
        """What the shared adapter's optimiser remembers; see `Learner.moments`."""
        return self.shared.moments()

    def restore(self, tensors: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Goes on from what `read` and `moments` told in another life."""
        self.shared.write(tensors)
        self.shared.restore(moments)
