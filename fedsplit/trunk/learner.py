"""An adapter of the trunk and its optimiser: every step publishes a version that never changes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedsplit.adaptation import rank_allocation
from fedsplit.adaptation.rank_budget import RankBudget
from fedsplit.config import TrainSettings
from fedsplit.model.devices import CPU, put
from fedsplit.optimization import optim
from fedsplit.optimization.bounds import is_bounded
from fedsplit.optimization.optim import make_optimizer
from fedsplit.optimization.orthogonality import Orthogonality
from fedsplit.optimization.terms import terms_of
from fedsplit.stages import GradientStage, LocalStep, Outcome, RoundStart
from fedsplit.updates import Task

Version = dict[str, Tensor]
"""An adapter that never changes, by exported name."""


class Unusable(ArithmeticError):
    """A step of the optimiser that was not made, since it would leave values that are not finite."""


class Learner:
    """An adapter that learns; older versions of it stay as they are.

    Attributes:
        version: The newest version. What learns in it takes gradients.
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
            start: By exported name.
            settings: The optimiser's.
            learns: Whether it learns at all.
            task: What the strategy asks of it.
            own: Its client's control variate.
            device: What it is used on; versions are there, what comes and goes otherwise is on the CPU.
            budget: Of the ranks that are dealt out after each step; none where not given.
            stage: The strategy's own gradient stage, for this adapter and this round alone.
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
        self._made = (0, 0)  # the round, and steps in it
        self._publish()

    def _publish(self) -> None:
        self.version: Version = {
            name: parameter.detach().clone().requires_grad_(name in self._learns)
            for name, parameter in self._parameters.items()
        }

    def step(self, gradients: Mapping[str, Tensor], rate: float = 1.0, round: int = 1) -> None:
        """Makes one step of the optimiser, after which all it knows is finite.

        Args:
            gradients: By exported name.
            rate: The share of the learning rate.
            round: The round, which counts where ranks are dealt out.

        Raises:
            Unusable: The step was not made: the gradient is not finite or its square overflows, or the adapter would
                not be finite after it. With the gradient bounded, the moments stay finite in any case.
        """
        assert self._optimizer is not None
        corrected = self._terms(gradients, LocalStep(self._parameters))
        if not is_bounded(*corrected.values()):
            raise Unusable("the gradient of the trunk's adapter is NaN, infinite or too large to be squared")
        for name, gradient in corrected.items():
            # The fused optimiser pairs elements by their place in memory: a transposed gradient would be scrambled.
            self._parameters[name].grad = gradient.contiguous()
        optim.step(self._optimizer, rate)
        if not is_bounded(*self._parameters.values()):
            self._return_to_version()
            raise Unusable("the trunk's adapter would not be finite after the step: --train.lr is too large")
        if self._allocation is not None:
            self._made = round, self._made[1] + 1 if self._made[0] == round else 1
            self._allocation.allocate(corrected, self._allocation.position(*self._made))
        self._publish()

    def regularised(self, version: Version, gradients: Mapping[str, Tensor], share: float = 1.0) -> dict[str, Tensor]:
        """The gradient of a part of a step by some version, with what a budget of ranks adds to it.

        Args:
            version: What it is by.
            gradients: By exported name.
            share: The share of the step that it is of.
        """
        budget = None if self._allocation is None else self._budget
        return dict(Orthogonality(version.keys(), budget, share)(gradients, LocalStep(version)))

    @torch.no_grad()
    def _return_to_version(self) -> None:
        """Undoes what a step has made of the adapter."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self.version[name])

    @torch.no_grad()
    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Replaces the adapter; the moments stay."""
        for name, parameter in self._parameters.items():
            parameter.copy_(tensors[name])
        self._publish()

    def outcome(self) -> Outcome:
        """Returns what the strategy's terms leave at the end of the round, on the CPU."""
        found = self._terms.end(self._parameters)
        return Outcome(put(found.kept, CPU), put(found.sent, CPU))

    def moments(self) -> dict[str, Tensor]:
        """What the optimiser remembers, by the parameter's name and what it is: "step", "exp_avg", ….

        Where ranks are dealt out, also what `RankAllocation.moments` tells.
        """
        dealt = {} if self._allocation is None else self._allocation.moments()
        return {**optim.moments(self._optimizer, self._trained), **dealt}

    def restore(self, moments: Mapping[str, Tensor]) -> None:
        """The inverse of `moments`, as far as they fit: see `fedsplit.optimization.optim.restore`."""
        optim.restore(self._optimizer, self._trained, moments)
        self._allocation = rank_allocation.begin(self._parameters, self._budget, moments)
