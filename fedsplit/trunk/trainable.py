"""Trainable adapters of the trunk. Every step of the optimiser makes a snapshot, and a snapshot never changes."""

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
"""Tensors of an adapter by exported name, never changed in place.

A pending forward keeps the snapshot, so that its backward gives exact gradients after any number of further steps.
torch would notice a change in place of a plain parameter, but not a change by a fused optimiser.
"""


class Unusable(ArithmeticError):
    """A step of the optimiser was not made, since the adapter would hold values that are not finite."""


_SAFE_NORM = 1e9
"""Norm of adapter and gradient up to which one step stays below `LARGEST_NORM`, except at extreme settings."""


def _may_overflow(settings: TrainSettings) -> bool:
    """Returns True if one step may take an adapter of norm `_SAFE_NORM` to values that are not finite.

    With smaller settings, no optimiser moves a coordinate by more than a thousand times `_SAFE_NORM`. With larger
    settings, the moments are copied before each step: an undone step must not leave a trace in the moments.
    """
    return settings.lr > 1 or settings.weight_decay > 1 or settings.eps < 1e-12 or settings.momentum > 0.999


class TrainableAdapter:
    """An adapter with an optimiser. Older snapshots stay unchanged.

    Attributes:
        snapshot: The newest snapshot. Trained tensors require gradients.
        steps: Number of steps of the optimiser so far.
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
            own: Control variate of the adapter's client.
            device: Device of the snapshots. All further arguments and results are on the CPU.
            budget: Budget of the ranks, which are allocated after each step; None for fixed ranks.
            stage: Gradient stage of the strategy, for the adapter and one round.
            kept: State of the stage after the client's last round.
        """
        start = put(start, device)
        task = task or Task()
        self._terms = terms_of(task, own, device, stage)
        self._terms.begin(RoundStart(start, put(kept or {}, device)))
        self._learns = {name for name in start if learns and task.teaches(name)}
        self._parameters: dict[str, nn.Parameter] = {}
        for name, tensor in start.items():
            # A copy: the optimiser changes parameters in place, and the start may be a snapshot that others hold.
            self._parameters[name] = nn.Parameter(tensor.detach().clone())
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
        """Makes the present state of the parameters the newest snapshot."""
        self.snapshot: AdapterSnapshot = {}
        for name, parameter in self._parameters.items():
            tensor = parameter.detach().clone()
            self.snapshot[name] = tensor.requires_grad_(name in self._learns)

    def step(self, gradients: Mapping[str, Tensor], rate: float = 1.0, round: int = 1) -> None:
        """Makes one step of the optimiser, or no step if adapter or moments would not be finite afterwards.

        Args:
            gradients: Gradients by exported name.
            rate: Share of the learning rate.
            round: Number of the round, for the allocation of ranks.

        Raises:
            Unusable: The gradient is not finite or too large to be squared, or the adapter would not be finite after
                the step. Adapter and moments stay unchanged. (A bounded gradient leaves the moments finite.)
        """
        assert self._optimizer is not None
        corrected = self._terms(gradients, LocalStep(self._parameters))
        gradient_size = norm(corrected.values())
        if not math.isfinite(gradient_size):
            raise Unusable("the gradient of the trunk's adapter is NaN, infinite or too large to be squared")
        for name, gradient in corrected.items():
            # The fused optimiser pairs elements by the place in memory: a transposed gradient would be scrambled.
            self._parameters[name].grad = gradient.contiguous()

        # AdamW's moments are twice as large as the adapter, and are copied only where the step may have to be undone.
        may_overflow = self._keeps_moments or max(gradient_size, self._size) > _SAFE_NORM
        moments_before = optim.moments(self._optimizer, self._trained) if may_overflow else {}
        optim.step(self._optimizer, rate)
        self._size = norm(self._parameters.values())
        if not math.isfinite(self._size):
            self._return_to_snapshot()
            optim.restore(self._optimizer, self._trained, moments_before)
            raise Unusable("the trunk's adapter would not be finite after the step: --train.lr is too large")

        self._allocate_ranks(corrected, round)
        self.steps += 1
        self._publish()

    def _allocate_ranks(self, gradients: Mapping[str, Tensor], round: int) -> None:
        """Allocates ranks after a step. Does nothing where ranks are fixed."""
        if self._allocation is None:
            return
        # AdaLoRA's schedule counts steps within a round, so that clients that were sampled less often keep pace.
        last_round, steps = self._made
        self._made = (round, steps + 1 if round == last_round else 1)
        self._allocation.allocate(gradients, self._allocation.position(*self._made))

    def regularised(
        self, snapshot: AdapterSnapshot, gradients: Mapping[str, Tensor], share: float = 1.0
    ) -> dict[str, Tensor]:
        """Returns a gradient with the regularisation that a rank budget adds.

        Args:
            snapshot: Snapshot of the adapter at the forward.
            gradients: Gradients by exported name.
            share: Share of the gradient in the optimiser's step, such as 0.5 for one of two batches.
        """
        budget = None if self._allocation is None else self._budget
        # At the snapshot of the forward, where the gradient was computed: the adapter may have moved on since.
        stage = Orthogonality(snapshot.keys(), budget, share)
        return dict(stage(gradients, LocalStep(snapshot)))

    @torch.no_grad()
    def _return_to_snapshot(self) -> None:
        """Undoes a step: sets the adapter back to the newest snapshot."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self.snapshot[name])
        self._size = norm(self._parameters.values())

    @torch.no_grad()
    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Replaces the tensors of the adapter. The optimiser's moments stay."""
        for name, parameter in self._parameters.items():
            parameter.copy_(tensors[name])
        self._size = norm(self._parameters.values())
        self._publish()

    def outcome(self) -> Outcome:
        """Returns the outcome of the strategy's terms at the end of the round, on the CPU."""
        outcome = self._terms.end(self._parameters)
        return Outcome(put(outcome.kept, CPU), put(outcome.sent, CPU))

    def moments(self) -> dict[str, Tensor]:
        """Returns the optimiser's state by parameter and kind ("step", "exp_avg", …), and the rank allocator's."""
        allocated = {} if self._allocation is None else self._allocation.moments()
        return {**optim.moments(self._optimizer, self._trained), **allocated}

    def restore(self, moments: Mapping[str, Tensor]) -> None:
        """Sets an earlier result of `moments`, as far as the shapes fit; see `fedsplit.optimization.optim.restore`."""
        optim.restore(self._optimizer, self._trained, moments)
        self._allocation = rank_allocation.begin(self._parameters, self._budget, moments)
