"""Trainable adapters of the trunk: every step of the optimiser makes a snapshot, which never changes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedsplit.adaptation import rank_allocation
from fedsplit.adaptation.rank_budget import RankBudget
from fedsplit.model.devices import CPU, put
from fedsplit.optimization import optim
from fedsplit.optimization.bounds import norm
from fedsplit.optimization.optim import make_optimizer
from fedsplit.optimization.orthogonality import Orthogonality
from fedsplit.optimization.terms import terms_of
from fedsplit.settings.sections import TrainSettings
from fedsplit.stages import GradientStage, LocalStep, Outcome, RoundStart
from fedsplit.updates import Task

AdapterSnapshot = dict[str, Tensor]
"""Tensors of an adapter by exported name, which are never changed in place."""


class Unusable(ArithmeticError):
    """A step of the optimiser was not made, since the adapter would hold values that are not finite."""


_SAFE_NORM = 1e9
"""Norm of adapter and gradient up to which one step at settings that are not extreme stays below `LARGEST_NORM`."""


def _may_overflow(settings: TrainSettings) -> bool:
    """Returns True where one step may take an adapter of norm `_SAFE_NORM` to values that are not finite.

    With settings below these, no optimiser moves a coordinate by more than `_SAFE_NORM` and a factor of a thousand.
    Elsewhere the moments are copied before each step, since a step that is not made must not leave its trace there.
    """
    return settings.lr > 1 or settings.weight_decay > 1 or settings.eps < 1e-12 or settings.momentum > 0.999


class TrainableAdapter:
    """An adapter with its optimiser; older snapshots of it stay as they are.

    Attributes:
        snapshot: The newest snapshot. Its trained tensors require gradients.
        steps: Number of steps that the optimiser has made.
    """

    def __init__(
        self,
        start: Mapping[str, Tensor],
        settings: TrainSettings,
        learns: bool,
        task: Task | None = None,
        own: Mapping[str, Tensor] | None = None,
        device: torch.device = CPU,
        budget: RankBudget | None = None,
        stage: GradientStage | None = None,
        kept: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Starts from an adapter.

        Args:
            start: Tensors by exported name.
            settings: Settings of the optimiser.
            learns: False for an adapter that is used and never trained.
            task: Instructions of the strategy.
            own: Control variate of the client that the adapter belongs to.
            device: Device that computes with it. Snapshots live there; everything else that is passed in or returned
                is on the CPU.
            budget: Budget of the ranks that are allocated after each step; None where ranks are fixed.
            stage: Gradient stage of the strategy, for the adapter and one round.
            kept: State that the stage kept of the client's last round.
        """
        start, task = put(start, device), task or Task()
        self._terms = terms_of(task, own, device, stage)
        self._terms.begin(RoundStart(start, put(kept or {}, device)))
        self._learns = {name for name in start if learns and task.teaches(name)}
        self._parameters = {name: nn.Parameter(tensor.detach().clone()) for name, tensor in start.items()}
        self._trained = {name: parameter for name, parameter in self._parameters.items() if name in self._learns}
        self._optimizer = make_optimizer(self._trained.values(), settings)
        self._budget = budget if learns else None
        self._allocation = rank_allocation.begin(self._parameters, self._budget)
        self._size = norm(self._parameters.values())
        self._keeps_moments = _may_overflow(settings)
        self.steps = 0
        self._made = (0, 0)  # round, and optimiser steps within it
        self._publish()

    @property
    def learns(self) -> bool:
        """True if any tensor of the adapter is trained."""
        return bool(self._learns)

    def _publish(self) -> None:
        self.snapshot: AdapterSnapshot = {
            name: parameter.detach().clone().requires_grad_(name in self._learns)
            for name, parameter in self._parameters.items()
        }

    def step(self, gradients: Mapping[str, Tensor], rate: float = 1.0, round: int = 1) -> None:
        """Makes one step of the optimiser, which leaves adapter and moments finite; or none, which changes neither.

        Args:
            gradients: Gradients by exported name.
            rate: Share of the learning rate.
            round: Number of the round, by which ranks are allocated.

        Raises:
            Unusable: The gradient is not finite or its square overflows, or the adapter would not be finite after the
                step. The step was not made. (A bounded gradient leaves the moments finite in any case.)
        """
        assert self._optimizer is not None
        corrected = self._terms(gradients, LocalStep(self._parameters))
        size = norm(corrected.values())
        if not math.isfinite(size):
            raise Unusable("the gradient of the trunk's adapter is NaN, infinite or too large to be squared")
        for name, gradient in corrected.items():
            # The fused optimiser pairs elements by their place in memory: a transposed gradient would be scrambled.
            self._parameters[name].grad = gradient.contiguous()
        keeps_moments = self._keeps_moments or max(size, self._size) > _SAFE_NORM
        moments = optim.moments(self._optimizer, self._trained) if keeps_moments else {}
        optim.step(self._optimizer, rate)
        self._size = norm(self._parameters.values())
        if not math.isfinite(self._size):
            self._return_to_snapshot()
            optim.restore(self._optimizer, self._trained, moments)
            raise Unusable("the trunk's adapter would not be finite after the step: --train.lr is too large")
        if self._allocation is not None:
            self._made = round, self._made[1] + 1 if self._made[0] == round else 1
            self._allocation.allocate(corrected, self._allocation.position(*self._made))
        self.steps += 1
        self._publish()

    def regularised(
        self, snapshot: AdapterSnapshot, gradients: Mapping[str, Tensor], share: float = 1.0
    ) -> dict[str, Tensor]:
        """Returns a gradient with the regularisation that a rank budget adds.

        Args:
            snapshot: Snapshot that the gradient was computed with.
            gradients: Gradients by exported name.
            share: Share of the optimiser's step that the gradient belongs to, such as 0.5 for one of two batches.
        """
        budget = None if self._allocation is None else self._budget
        return dict(Orthogonality(snapshot.keys(), budget, share)(gradients, LocalStep(snapshot)))

    @torch.no_grad()
    def _return_to_snapshot(self) -> None:
        """Undoes a step: sets the adapter back to its newest snapshot."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self.snapshot[name])
        self._size = norm(self._parameters.values())

    @torch.no_grad()
    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Replaces the adapter; the optimiser keeps its moments."""
        for name, parameter in self._parameters.items():
            parameter.copy_(tensors[name])
        self._size = norm(self._parameters.values())
        self._publish()

    def outcome(self) -> Outcome:
        """Returns what the strategy's terms leave at the end of the round, on the CPU."""
        found = self._terms.end(self._parameters)
        return Outcome(put(found.kept, CPU), put(found.sent, CPU))

    def moments(self) -> dict[str, Tensor]:
        """Returns the optimiser's state by parameter and kind ("step", "exp_avg", …), and the rank allocation's."""
        allocated = {} if self._allocation is None else self._allocation.moments()
        return {**optim.moments(self._optimizer, self._trained), **allocated}

    def restore(self, moments: Mapping[str, Tensor]) -> None:
        """Sets the state that `moments` returned, as far as it fits: see `fedsplit.optimization.optim.restore`."""
        optim.restore(self._optimizer, self._trained, moments)
        self._allocation = rank_allocation.begin(self._parameters, self._budget, moments)
