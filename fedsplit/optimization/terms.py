"""Terms that a strategy adds to a party's gradients: control variates, a proximal term, decay of a rank's tail.

Clients and the trunk's copies train by the same stages.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsplit.model.devices import CPU, put
from fedsplit.stages import Gradients, GradientStage, LocalStep, Outcome, RoundStart, Stages
from fedsplit.updates import Task, factor_of, sure_rank


def terms_of(
    task: Task,
    control: Mapping[str, Tensor] | None = None,
    device: torch.device = CPU,
    own: GradientStage | None = None,
) -> Stages:
    """Returns the stages that a task asks for, in their order.

    Args:
        task: The strategy's task for a client.
        control: The party's control variate c_i, by exported name. A missing tensor is zero.
        device: Device of the party's parameters.
        own: The strategy's own stage, which runs last.

    Example:
        >>> terms = terms_of(Task(proximal=0.5))
        >>> terms.begin(RoundStart({"w": torch.zeros(1)}))
        >>> terms({"w": torch.tensor([1.0])}, LocalStep({"w": torch.tensor([4.0])}))
        {'w': tensor([3.])}
    """
    stages: list[GradientStage] = []
    if task.control is not None:
        stages.append(ControlVariates(put(task.control, device), put(control or {}, device)))
    if task.proximal:
        stages.append(Proximal(task.proximal))
    if task.decay:
        stages.append(TailDecay(task.tail, task.decay))
    if own is not None:
        stages.append(own)
    return Stages(*stages)


def moved(control: Mapping[str, Tensor], changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a party's control variate after a round that changed it. A missing tensor was zero."""
    return {name: control[name] + change if name in control else change for name, change in changes.items()}


class ControlVariates(GradientStage):
    """SCAFFOLD's correction (1910.06378): g - c_i + c; the client's c_i becomes the mean of its raw gradients g."""

    def __init__(self, server: Mapping[str, Tensor], client: Mapping[str, Tensor]) -> None:
        """Takes both control variates.

        Args:
            server: The server's c, by exported name.
            client: The client's c_i. A missing tensor is zero.
        """
        self._server, self._client = server, client
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    def __call__(self, gradients: Gradients, step: LocalStep) -> Gradients:
        """Returns g - c_i + c for each gradient g, and adds g to the sum."""
        self._steps += 1
        corrected = dict(gradients)
        for name, gradient in gradients.items():
            self._sums[name] = self._sums[name] + gradient if name in self._sums else gradient.clone()
            if name in self._server:
                corrected[name] = corrected[name] + self._server[name]
            if name in self._client:
                corrected[name] = corrected[name] - self._client[name]
        return corrected

    def end(self, parameters: Mapping[str, Tensor]) -> Outcome:
        """Sends the change c_i+ - c_i, with c_i+ the mean of the raw gradients.

        Under plain SGD that mean is the paper's c_i - c + (theta_t - theta_i) / (K eta). Unlike the paper's formula it
        has a meaning under any other optimiser, too.
        """
        means = {name: total / self._steps for name, total in self._sums.items()}
        changes = {name: mean - self._client[name] if name in self._client else mean for name, mean in means.items()}
        return Outcome(sent=changes)


class Proximal(GradientStage):
    """FedProx's pull (1812.06127): the gradient of mu / 2 * ||theta - theta_t||^2."""

    def __init__(self, mu: float) -> None:
        """Takes the pull's strength."""
        self._mu = mu

    def begin(self, start: RoundStart) -> None:
        """Remembers theta_t, the round's start."""
        self._start = {name: tensor.detach().clone() for name, tensor in start.adapters.items()}

    def __call__(self, gradients: Gradients, step: LocalStep) -> Gradients:
        """Adds mu * (theta - theta_t)."""
        return {
            name: gradient + self._mu * (step.parameters[name] - self._start[name])
            for name, gradient in gradients.items()
        }


class TailDecay(GradientStage):
    """HetLoRA's decay (2401.06432): the gradient of decay * ||A_tail|| * ||B_tail||, layer by layer."""

    def __init__(self, tail: float, decay: float) -> None:
        """Takes the share of the rank that is no tail, and the decay's strength."""
        self._tail, self._decay = tail, decay

    def __call__(self, gradients: Gradients, step: LocalStep) -> Gradients:
        """Adds the pull on both factors of each layer. A tail of zeros has no gradient, and gets none."""
        corrected = dict(gradients)
        for name, pull in self._pulls(step.parameters).items():
            if name in corrected:
                corrected[name] = corrected[name] + pull
        return corrected

    def _pulls(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        pulls = {}
        for name, a in parameters.items():
            if factor_of(name) != "A":
                continue
            other = name.replace(".lora_A.", ".lora_B.")
            b = parameters[other]
            sure = sure_rank(a.shape[0], self._tail)
            norm_a, norm_b = a[sure:].norm(), b[:, sure:].norm()
            if float(norm_a) > 0 and float(norm_b) > 0:
                pulls[name], pulls[other] = torch.zeros_like(a), torch.zeros_like(b)
                pulls[name][sure:] = self._decay * norm_b / norm_a * a[sure:]
                pulls[other][:, sure:] = self._decay * norm_a / norm_b * b[:, sure:]
        return pulls
